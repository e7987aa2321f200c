//! Which tokens: text from a file or from the binary, encoded by the checkpoint's own tokenizer, cut into windows.
//!
//! Stands before the forward pass, for those who run it: the verifier, which asks how much was lost, and calibration,
//! which asks what the experts see. Knows nothing of weights.
//!
//! **Bundled texts**, all in the public domain, from Project Gutenberg. They do not overlap, so that the default
//! verification is not of the text that was calibrated on.
//!
//! | [`Passage`] | What |
//! |---|---|
//! | `Verification` | the opening of *Jack Sheppard* (William Harrison Ainsworth, 1839), 61 kB from chapter I on; the bundled models were trained on other books |
//! | `Calibration` | 321 kB in five parts: *Middlemarch*, *Moby-Dick*, Shakespeare, *David Copperfield*, *News from Nowhere*: narrative, drama, dialogue |

mod chat;
mod encoder;
mod error;
pub mod readers;
mod vocabulary;
mod windows;

pub use error::TextError;
pub use vocabulary::{vocabulary_info, vocabulary_windows};
pub use windows::{Passage, Pick, TextInfo, TextRequest, TextSource, Windows, encode_with, windows};
