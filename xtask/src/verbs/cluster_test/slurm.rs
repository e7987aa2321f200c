//! A Slurm cluster on this machine: munged, a controller and some nodes, stopped by their process ids in the end.

use crate::shell::{command, output, run as sh};
use anyhow::{Context, Result, ensure};
use std::cell::RefCell;
use std::ffi::OsStr;
use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Longest time for a daemon to be ready.
const PATIENCE: Duration = Duration::from_secs(30);
/// First port of the nodes; the controller has the one before.
const PORT: u16 = 17_101;

/// Running daemons.
pub(super) struct Slurm {
    folder: tempfile::TempDir,
    munged: RefCell<Option<Child>>,
    controller: RefCell<Option<Child>>,
    nodes: RefCell<Vec<Option<Child>>>,
}

/// Whether this machine has what a cluster needs.
pub(super) fn is_installed() -> bool {
    ["slurmctld", "slurmd", "munged"].iter().all(|program| {
        ["/usr/sbin", "/usr/local/sbin"].iter().any(|folder| Path::new(folder).join(program).is_file())
    })
}

impl Slurm {
    /// Starts a cluster.
    pub(super) fn start(nodes: usize) -> Result<Self> {
        // Outside the checkout, whose folders munge's own user may not enter.
        let folder = tempfile::Builder::new().prefix("lowrank-slurm-").tempdir()?;
        let slurm = Self {
            folder,
            munged: RefCell::default(),
            controller: RefCell::default(),
            nodes: RefCell::new((0..nodes).map(|_| None).collect()),
        };
        slurm.start_munged()?;
        std::fs::write(slurm.config(), slurm.settings(nodes)?)?;
        std::fs::create_dir(slurm.folder.path().join("state"))?;
        slurm.start_controller()?;
        (0..nodes).try_for_each(|node| slurm.start_node(node))?;
        let idle = |said: &str| said.split_whitespace().filter(|state| *state == "idle").count() == nodes;
        slurm.until("every node is idle", &|| {
            Ok(idle(&output(slurm.command("sinfo").args(["--noheader", "--Node", "--format=%T"]))?))
        })?;
        Ok(slurm)
    }

    fn config(&self) -> std::path::PathBuf {
        self.folder.path().join("slurm.conf")
    }

    /// A command that talks to this cluster.
    pub(super) fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = command(program);
        command.env("SLURM_CONF", self.config());
        command
    }

    fn settings(&self, nodes: usize) -> Result<String> {
        let host = output(command("hostname").arg("-s"))?;
        let (host, folder) = (host.trim(), self.folder.path().display());
        let mut text = format!(
            "ClusterName=test\nSlurmctldHost={host}(127.0.0.1)\nSlurmctldPort={}\n\
             AuthType=auth/munge\nAuthInfo=socket={folder}/munge/socket\nCredType=cred/munge\n\
             SlurmUser=root\nSlurmdUser=root\nProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\n\
             SelectType=select/cons_tres\nSelectTypeParameters=CR_CPU\nReturnToService=2\nMpiDefault=none\n\
             StateSaveLocation={folder}/state\nSlurmdSpoolDir={folder}/spool.%n\n\
             SlurmctldPidFile={folder}/slurmctld.pid\nSlurmdPidFile={folder}/slurmd.%n.pid\n\
             SlurmctldLogFile={folder}/slurmctld.log\nSlurmdLogFile={folder}/slurmd.%n.log\n\
             SlurmdTimeout=5\nInactiveLimit=0\nMinJobAge=2\nJobRequeue=1\nKillWait=2\n\
             SchedulerType=sched/builtin\nSchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0\n",
            PORT - 1
        );
        for node in 0..nodes {
            let port = PORT + node as u16;
            text += &format!(
                "NodeName=n{node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 State=UNKNOWN\n"
            );
        }
        text +=
            &format!("PartitionName=all Nodes=n[0-{}] Default=YES MaxTime=INFINITE State=UP\n", nodes - 1);
        Ok(text)
    }

    fn daemon(&self, name: &str, command: &mut Command) -> Result<Child> {
        let log = File::create(self.folder.path().join(format!("{name}.out")))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        command.spawn().with_context(|| format!("cannot start {name}"))
    }

    /// As its own user, as it wants.
    fn start_munged(&self) -> Result<()> {
        let place = self.folder.path().join("munge");
        std::fs::create_dir(&place)?;
        let key = place.join("key");
        std::fs::write(&key, (0..128_u8).collect::<Vec<u8>>())?;
        sh(command("chmod").arg("755").arg(self.folder.path()))?;
        sh(command("chmod").arg("400").arg(&key))?;
        sh(command("chown").arg("-R").arg("munge:munge").arg(&place))?;
        let mut munged = command("runuser");
        munged.args(["-u", "munge", "--", "/usr/sbin/munged", "--foreground", "--force"]);
        for (flag, file) in [
            ("socket", "socket"),
            ("key-file", "key"),
            ("pid-file", "pid"),
            ("log-file", "log"),
            ("seed-file", "seed"),
        ] {
            munged.arg(format!("--{flag}={}", place.join(file).display()));
        }
        *self.munged.borrow_mut() = Some(self.daemon("munged", &mut munged)?);
        self.until("munged answers", &|| Ok(place.join("socket").exists()))
    }

    fn start_controller(&self) -> Result<()> {
        let mut controller = self.command("/usr/sbin/slurmctld");
        *self.controller.borrow_mut() = Some(self.daemon("slurmctld", controller.arg("-D"))?);
        self.until("the controller answers", &|| {
            Ok(self.command("scontrol").arg("ping").output()?.status.success())
        })
    }

    /// Kills the controller and starts it again.
    pub(super) fn restart_controller(&self) -> Result<()> {
        if let Some(child) = self.controller.take() {
            end(child);
        }
        self.start_controller()
    }

    /// Starts a node.
    pub(super) fn start_node(&self, node: usize) -> Result<()> {
        let mut daemon = self.command("/usr/sbin/slurmd");
        daemon.args(["-D", "-N", &format!("n{node}")]);
        let child = self.daemon(&format!("slurmd-{node}"), &mut daemon)?;
        self.nodes.borrow_mut()[node] = Some(child);
        Ok(())
    }

    /// Starts the nodes that were killed, and lets those work that the controller drained.
    pub(super) fn start_dead_nodes(&self) -> Result<()> {
        let nodes = output(self.command("sinfo").args(["--noheader", "--Node", "--format=%N %T"]))?;
        for node in
            nodes.lines().filter_map(|line| line.strip_suffix(" drained").or(line.strip_suffix(" draining")))
        {
            sh(self.command("scontrol").args(["update", &format!("NodeName={node}"), "State=resume"]))?;
        }
        let dead: Vec<usize> = self
            .nodes
            .borrow()
            .iter()
            .enumerate()
            .filter(|(_, node)| node.is_none())
            .map(|(at, _)| at)
            .collect();
        dead.into_iter().try_for_each(|node| self.start_node(node))
    }

    /// Kills a node with everything that runs on it, without a word to anybody.
    pub(super) fn kill_node(&self, node: usize) -> Result<()> {
        let mut nodes = self.nodes.borrow_mut();
        let child = nodes[node].take();
        ensure!(child.is_some(), "node {node} does not run");
        // Steps are processes of their own that name their node.
        let steps = output(command("pgrep").args(["-f", &format!("slurmstepd: .*n{node}|spool.n{node}")]))
            .unwrap_or_default();
        if let Some(child) = child {
            end(child);
        }
        for step in steps.split_whitespace() {
            let _ = command("pkill").args(["-KILL", "-P", step]).status();
            let _ = command("kill").args(["-KILL", step]).status();
        }
        Ok(())
    }

    fn until(&self, what: &str, is_so: &dyn Fn() -> Result<bool>) -> Result<()> {
        let start = Instant::now();
        while !is_so().unwrap_or(false) {
            ensure!(
                start.elapsed() < PATIENCE,
                "not within {PATIENCE:?}: {what}; {}",
                self.folder.path().display()
            );
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }
}

fn end(mut child: Child) {
    let _ = child.kill();
    let _ = child.wait();
}

impl Drop for Slurm {
    fn drop(&mut self) {
        let nodes = self.nodes.take().into_iter().flatten();
        for child in nodes.chain(self.controller.take()) {
            end(child);
        }
        // runuser hands a signal on to munged.
        if let Some(mut munged) = self.munged.take() {
            let _ = command("kill").args(["-TERM", &munged.id().to_string()]).status();
            let _ = munged.wait();
        }
    }
}
