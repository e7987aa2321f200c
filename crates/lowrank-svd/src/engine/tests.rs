//! Spectrum and factors against direct decompositions, by norm and by route.

mod calibrated;
mod data_free;
mod projector;
mod spectrum;
