//! One command, one file: call the job, print what came of it.

pub(crate) mod cluster;
pub(crate) mod compress;
pub(crate) mod densify;
pub(crate) mod inspect;
pub(crate) mod man;
pub(crate) mod report;
pub(crate) mod reproduce;
mod shared;
pub(crate) mod sweep;
pub(crate) mod verify;
