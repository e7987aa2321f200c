//! What a part has found: a document for programs and a text for people, both written as it grows.

use serde_json::{Map, Value};
use std::error::Error;
use std::path::PathBuf;

pub(crate) type Failure = Box<dyn Error + Send + Sync>;

/// What a part has found so far: for machines, and for people. Written as it grows.
pub(crate) struct Results {
    pub(crate) out: PathBuf,
    pub(crate) part: &'static str,
    pub(crate) json: Map<String, Value>,
    pub(crate) text: String,
    /// What was judged and is not equal.
    pub(crate) unequal: Vec<String>,
}

impl Results {
    pub(crate) fn line(&mut self, text: impl AsRef<str>) {
        println!("{}", text.as_ref());
        self.text.push_str(text.as_ref());
        self.text.push('\n');
    }

    pub(crate) fn set(&mut self, key: &str, value: impl Into<Value>) -> Result<(), Failure> {
        self.json.insert(key.into(), value.into());
        self.save()
    }

    pub(crate) fn save(&self) -> Result<(), Failure> {
        std::fs::create_dir_all(&self.out)?;
        std::fs::write(self.out.join(self.part).with_extension("md"), &self.text)?;
        let document = serde_json::to_string_pretty(&self.json)?;
        Ok(std::fs::write(self.out.join(self.part).with_extension("json"), document)?)
    }

    pub(crate) fn judge(&mut self, what: &str, value: f64, limit: f64) -> Result<(), Failure> {
        // Written so that NaN fails.
        let equal = value <= limit;
        if !equal {
            self.unequal.push(format!("{what}: {value:.1e}"));
        }
        let verdict = if equal { "yes" } else { "**NO**" };
        self.line(format!("| {what} | {value:.1e} | {limit:.0e} | {verdict} |"));
        self.save()
    }

    pub(crate) fn parity_table(&mut self, title: &str) {
        self.line(format!("## {title}\n\n| what | difference | allowed | equal |\n|---|---|---|---|"));
    }
}
