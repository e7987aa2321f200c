//! What Slurm gave a task: cores and memory, from its environment.

use crate::args::MachineFlags;
use crate::exit::{Result, usage};
use lowrank_model::recipe::ByteSize;

/// Cores of this machine that the job has.
const CORES: &str = "SLURM_CPUS_ON_NODE";
/// Its memory on this machine, in MiB.
const MEMORY: &str = "SLURM_MEM_PER_NODE";
/// Its memory for each of those cores, in MiB.
const MEMORY_PER_CORE: &str = "SLURM_MEM_PER_CPU";

/// The same flags, with what Slurm gave where they say nothing.
pub(super) fn within(flags: MachineFlags, variable: &dyn Fn(&str) -> Option<String>) -> Result<MachineFlags> {
    let number = |name: &str| -> Result<Option<u64>> {
        let Some(text) = variable(name) else { return Ok(None) };
        let number = text.parse().map_err(|_| usage(format!("{name}={text}: Slurm should say a number")))?;
        Ok(Some(number).filter(|&number| number > 0))
    };
    let cores = number(CORES)?;
    let per_core =
        number(MEMORY_PER_CORE)?.zip(cores).map(|(mebibytes, cores)| mebibytes.saturating_mul(cores));
    let mebibytes = number(MEMORY)?.or(per_core);
    let memory = mebibytes.map(|mebibytes| ByteSize(mebibytes.saturating_mul(1 << 20)));
    Ok(MachineFlags {
        workers: flags.workers.or(cores.map(|cores| cores as usize)),
        memory: flags.memory.or(memory),
        ..flags
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn within_of(flags: MachineFlags, variables: &[(&str, &str)]) -> (Option<usize>, Option<u64>) {
        let variable = |wanted: &str| {
            variables.iter().find(|(name, _)| *name == wanted).map(|(_, value)| (*value).to_owned())
        };
        let flags = within(flags, &variable).unwrap();
        (flags.workers, flags.memory.map(|size| size.0))
    }

    #[test]
    fn a_task_keeps_to_what_slurm_gave_it_unless_the_user_says_otherwise() {
        let none = MachineFlags::default;
        assert_eq!(within_of(none(), &[]), (None, None));
        assert_eq!(within_of(none(), &[(CORES, "16"), (MEMORY, "4096")]), (Some(16), Some(4 << 30)));
        assert_eq!(within_of(none(), &[(CORES, "3"), (MEMORY_PER_CORE, "1024")]), (Some(3), Some(3 << 30)));
        // Slurm writes 0 for all memory of a machine.
        assert_eq!(within_of(none(), &[(CORES, "2"), (MEMORY, "0")]), (Some(2), None));
        let own = MachineFlags { workers: Some(1), memory: Some(ByteSize(7)), ..none() };
        assert_eq!(within_of(own, &[(CORES, "16"), (MEMORY, "4096")]), (Some(1), Some(7)));
        let broken = within(none(), &|name| (name == CORES).then(|| "2(x3)".to_owned()));
        assert!(broken.unwrap_err().to_string().contains("SLURM_CPUS_ON_NODE=2(x3)"));
    }
}
