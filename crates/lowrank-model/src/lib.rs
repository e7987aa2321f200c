//! What every other crate agrees on: matrix ids, tensor names, parameter counts, budgets, spectra and plans.
//!
//! The leaf of the workspace. No I/O, no linear algebra, no threads: everything here is a value or a pure function.
//!
//! | Module | The one place for |
//! |---|---|
//! | [`matrix`] | which expert matrix is meant, and its shape |
//! | [`widths`] | which of an expert's channels stay |
//! | [`config`] | what a model is: dimensions, block, and the seam to its family |
//! | [`rules`] | what a key of a config may say |
//! | [`block`] | a decoder layer as data |
//! | [`family`] | the known families, one file each, and which one a checkpoint is of |
//! | [`names`] | what a tensor is for, and how transformers spells it |
//! | [`tensors`] | the tensors of a model, and where each lies in a checkpoint |
//! | [`chat`] | where a model's chat templates lie |
//! | [`named`] | an expert matrix as documents carry it |
//! | [`params`] | how many parameters a matrix costs, dense or at a rank |
//! | [`pivots`] | shapes and index of pivoted storage |
//! | [`budget`] | how budgets and sizes are spelled, in exact integers |
//! | [`recipe`] | every setting that decides the bytes of an output |
//! | [`rotation`] | rotations of queries and keys that differ from the plain one |
//! | [`spectrum`] | the error of every rank |
//! | [`curves`] | spectra thinned for people to look at |
//! | [`plan`] | the rank table, ready to be printed, stored and executed |
//! | [`ranks`] | the flat rank map of `--ranks` |
//! | [`progress`] | how long work reports that it moves |
//! | [`stored`] | an expert matrix as it is stored, dense or factored |
//! | [`tensor`] | stored weights as bytes, widened to f32 on demand |
//! | [`device`] | where work is done |
//! | [`display`] | how counts are shown |
//! | [`failure`] | kinds of failure, and how an error is printed with its causes |
//! | [`mod@format`] | keys and version of the factored checkpoint format |

pub mod block;
pub mod budget;
pub mod chat;
pub mod config;
pub mod curves;
pub mod device;
pub mod display;
pub mod dtype;
pub mod failure;
pub mod family;
pub mod format;
pub mod matrix;
pub mod named;
pub mod names;
pub mod params;
pub mod pivots;
pub mod plan;
pub mod progress;
pub mod quantiser;
pub mod ranks;
pub mod recipe;
pub mod rotation;
pub mod rules;
pub mod spectrum;
pub mod stored;
pub mod tensor;
pub mod tensors;
pub mod widths;

pub use budget::{Target, Unit};
pub use config::{Family, ModelConfig};
pub use curves::SpectrumCurves;
pub use device::{AlgebraChoice, Device};
pub use dtype::{Dtype, ElementType};
pub use failure::ErrorKind;
pub use matrix::{MatrixId, MatrixShape, Projection, SHARED_EXPERT};
pub use named::NamedMatrix;
pub use names::Layout;
pub use params::{CostModel, ElementBytes, Storage};
pub use pivots::{PivotOrder, PivotSide};
pub use plan::RankPlan;
pub use progress::Progress;
pub use quantiser::Quantiser;
pub use recipe::Recipe;
pub use rotation::{LongRope, Rotation, Stretch, Yarn};
pub use spectrum::Spectrum;
pub use stored::StoredMatrix;
pub use tensor::Tensor;
pub use widths::{KeptChannels, Widths};
