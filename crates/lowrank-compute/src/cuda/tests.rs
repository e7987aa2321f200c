//! Each kernel and each operation against a plain reference in f64, where there is a device; and what can be checked
//! without one.

use super::device::FUNCTION_NAMES;
use super::kernels;

#[test]
fn every_kernel_of_the_source_is_loaded_and_no_other() {
    let mut written = kernels::names();
    let mut loaded = FUNCTION_NAMES.to_vec();
    written.sort_unstable();
    loaded.sort_unstable();
    assert_eq!(written, loaded);
}
