//! Chat templates of a model: where they lie, and which is applied where none is named.

use serde_json::Value;
use std::path::PathBuf;

/// A chat template and the file that contains it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChatTemplate {
    /// `default`, or the name by which `apply_chat_template` is asked for another.
    pub name: String,
    /// File name.
    pub file: String,
    /// Jinja.
    pub text: String,
}

/// Reads what a config holds as `chat_template`: one text, a list of `{"name", "template"}`, or a map from name to text.
fn templates_of(file: &str, json: &[u8]) -> Vec<ChatTemplate> {
    let config: Value = serde_json::from_slice(json).unwrap_or_default();
    let template = |name: &str, text: &Value| {
        Some(ChatTemplate { name: name.into(), file: file.into(), text: text.as_str()?.to_owned() })
    };
    let named = |entry: &Value| template(entry.get("name")?.as_str()?, entry.get("template")?);
    match config.get("chat_template") {
        Some(Value::Array(entries)) => entries.iter().filter_map(named).collect(),
        Some(Value::Object(map)) => map.iter().filter_map(|(name, text)| template(name, text)).collect(),
        Some(text) => template(DEFAULT, text).into_iter().collect(),
        None => Vec::new(),
    }
}

/// The template that is applied where none is named.
pub const DEFAULT: &str = "default";
/// Read by `AutoProcessor` alone.
pub const PROCESSOR_TEMPLATE_FILE: &str = "chat_template.json";

impl ChatTemplate {
    /// Finds the templates of a model as transformers does: the files `chat_template.jinja` and
    /// `additional_chat_templates/NAME.jinja`; without any of them the key in `tokenizer_config.json`; else those of
    /// `chat_template.json`, which only a processor reads. `names` are the files of the model's folder, `read` gives the text
    /// of one.
    pub fn find(names: &[PathBuf], read: impl Fn(&str) -> Option<Vec<u8>>) -> Vec<Self> {
        let file_names = names.iter().filter_map(|name| name.to_str());
        let template = |file: &str| {
            let name = match file {
                "chat_template.jinja" => DEFAULT,
                file => file.strip_prefix("additional_chat_templates/")?.strip_suffix(".jinja")?,
            };
            let text = String::from_utf8(read(file)?).ok()?;
            Some(Self { name: name.into(), file: file.into(), text })
        };
        let mut found: Vec<Self> = file_names.filter_map(template).collect();
        for file in ["tokenizer_config.json", PROCESSOR_TEMPLATE_FILE] {
            if found.is_empty() {
                found = read(file).map_or_else(Vec::new, |json| templates_of(file, &json));
            }
        }
        found.sort_by(|a, b| (a.name != DEFAULT, &a.name).cmp(&(b.name != DEFAULT, &b.name)));
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The templates in a folder with these files.
    fn found(files: &[(&str, &str)]) -> Vec<ChatTemplate> {
        let names: Vec<PathBuf> = files.iter().map(|(name, _)| name.into()).collect();
        ChatTemplate::find(&names, |name| {
            files.iter().find(|(file, _)| *file == name).map(|(_, text)| text.as_bytes().to_vec())
        })
    }

    #[test]
    fn templates_are_found_where_transformers_finds_them() {
        assert_eq!(found(&[]), []);
        let config = ("tokenizer_config.json", r#"{"chat_template": "{{ a }}"}"#);
        let (file, rag) =
            (("chat_template.jinja", "{{ b }}"), ("additional_chat_templates/rag.jinja", "{{ c }}"));
        let list = (
            "tokenizer_config.json",
            r#"{"chat_template": [{"name": "agent", "template": "{{ d }}"}, {"name": "default", "template": "{{ e }}"}]}"#,
        );
        let processor = ("chat_template.json", r#"{"chat_template": "{{ f }}"}"#);
        for (files, expected) in [
            (&[config][..], &[("default", "tokenizer_config.json", "{{ a }}")][..]),
            // Files win over the config, as in transformers.
            (&[config, file], &[("default", "chat_template.jinja", "{{ b }}")]),
            (&[list, rag], &[("rag", "additional_chat_templates/rag.jinja", "{{ c }}")]),
            (
                &[rag, file, processor],
                &[
                    ("default", "chat_template.jinja", "{{ b }}"),
                    ("rag", "additional_chat_templates/rag.jinja", "{{ c }}"),
                ],
            ),
            (
                &[list, processor],
                &[
                    ("default", "tokenizer_config.json", "{{ e }}"),
                    ("agent", "tokenizer_config.json", "{{ d }}"),
                ],
            ),
            (&[processor], &[("default", "chat_template.json", "{{ f }}")]),
            (&[("tokenizer_config.json", "{\"chat_template\": null}")], &[]),
        ] {
            let found = found(files);
            let found: Vec<_> =
                found.iter().map(|one| (one.name.as_str(), one.file.as_str(), one.text.as_str())).collect();
            assert_eq!(found, expected);
        }
    }
}
