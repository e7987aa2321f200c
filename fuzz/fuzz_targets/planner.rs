//! `cargo fuzz run planner`; the body is in `crates/lowrank-fuzz`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    lowrank_fuzz::target("planner")(bytes);
});
