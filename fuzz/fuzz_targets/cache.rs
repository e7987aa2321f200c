//! `cargo fuzz run cache`; the body is in `crates/lowrank-fuzz`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    lowrank_fuzz::target("cache")(bytes);
});
