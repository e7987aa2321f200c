//! Why there are no tokens.

use lowrank_model::ErrorKind;
use std::path::PathBuf;

/// A text that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// A text or token file could not be read.
    #[error("{}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A text file of a kind that is not known.
    #[error(
        "{}: the name does not say what the file holds; give a .txt or .md (text), a .jsonl or .ndjson (rows with a `text` or `messages`), a .json (an array of texts or of token ids) or an .ids (token ids)",
        path.display()
    )]
    Kind {
        /// The file.
        path: PathBuf,
    },
    /// A text or token file that does not hold what its ending says.
    #[error("{}: {what}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where.
        what: String,
    },
    /// The tokenizer is absent or unusable.
    #[error("{}: {what}; give token ids (.json, .ids) instead of text", path.display())]
    Tokenizer {
        /// `tokenizer.json`.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A tokenizer that loses most of the text.
    #[error(
        "{}: makes {tokens} tokens of {characters} characters, so it loses most of the text; give a text that it knows, or token ids (.json, .ids)",
        path.display()
    )]
    Lost {
        /// `tokenizer.json`.
        path: PathBuf,
        /// How many there are.
        tokens: usize,
        /// Characters that were encoded, without whitespace.
        characters: usize,
    },
    /// Far less text than was asked for.
    #[error(
        "the text has {tokens} tokens, {wanted} were asked for; give at least {least}, or ask for no more than there are"
    )]
    TooFew {
        /// How many there are.
        tokens: usize,
        /// How many were asked for.
        wanted: usize,
        /// What is enough.
        least: usize,
    },
    /// Too little text to predict anything.
    #[error("the text has {tokens} tokens; at least 2 are needed to predict one from another")]
    TooShort {
        /// How many there are.
        tokens: usize,
    },
    /// A window in which nothing can be predicted.
    #[error("the window is {window} tokens; at least 2 are needed to predict one from another")]
    Window {
        /// What was asked for.
        window: usize,
    },
}

impl TextError {
    /// What kind of failure it is: a setting names each text, and token ids serve where the tokenizer does not.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Read { .. }
            | Self::Kind { .. }
            | Self::Content { .. }
            | Self::Tokenizer { .. }
            | Self::Lost { .. }
            | Self::TooFew { .. }
            | Self::TooShort { .. }
            | Self::Window { .. } => ErrorKind::Usage,
        }
    }
}
