//! Chats as the text that a model sees: `messages`, rendered by the checkpoint's own chat template as transformers'
//! `apply_chat_template` does, without a prompt for an answer.

use lowrank_model::chat::ChatTemplate;
use lowrank_model::display::abridge;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, Error, ErrorKind, Value as Jinja, context};
use serde::Serialize;
use serde_json::Value;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};
use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

/// The name of the template in its environment.
const NAME: &str = "chat_template";
/// Tokens that templates write.
const SPECIAL: [&str; 4] = ["bos_token", "eos_token", "unk_token", "pad_token"];

/// Renders chats.
pub(crate) struct ChatRenderer {
    environment: Environment<'static>,
    /// Special tokens by the names that templates use.
    special: BTreeMap<&'static str, String>,
}

impl ChatRenderer {
    /// With the default template of the model in this folder. The error is one line.
    pub(crate) fn of(dir: &Path) -> Result<Self, String> {
        let read = |name: &str| std::fs::read(dir.join(name)).ok();
        let templates = ChatTemplate::find(&["chat_template.jinja".into()], read);
        let default = templates.into_iter().find(|template| template.name == lowrank_model::chat::DEFAULT);
        let ChatTemplate { text, file, .. } = default.ok_or_else(|| {
            format!("{} has no default chat template; write chats as `text`", dir.display())
        })?;
        let config = read("tokenizer_config.json").unwrap_or_default();
        let config: Value = serde_json::from_slice(&config).unwrap_or_default();
        Self::new(text, &config).map_err(|what| format!("{file}: {what}"))
    }

    /// With a template and the content of `tokenizer_config.json`.
    fn new(template: String, config: &Value) -> Result<Self, String> {
        let mut environment = Environment::new();
        // What transformers sets.
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| error.to_string())?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        // A template is foreign code: this many steps are a hundred times what a long chat takes.
        environment.set_fuel(Some(10_000_000));
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", |what: String| -> Result<Jinja, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, what))
        });
        environment.add_function("strftime_now", |_: String| -> Result<Jinja, Error> {
            let what = "asks for the date, so that its text changes from day to day; write chats as `text`";
            Err(Error::new(ErrorKind::InvalidOperation, what))
        });
        environment.add_template_owned(NAME, template).map_err(|error| abridge(&error.to_string()))?;
        let token = |name: &'static str| {
            let token = &config[name];
            let text = token.as_str().or_else(|| token.get("content")?.as_str())?;
            Some((name, text.to_owned()))
        };
        Ok(Self { environment, special: SPECIAL.into_iter().filter_map(token).collect() })
    }

    /// The text of a chat.
    pub(crate) fn render(&self, messages: &[Value]) -> Result<String, String> {
        let template = self.environment.get_template(NAME).expect("added when made");
        let none = || Jinja::from(());
        let given = context! {
            messages => Jinja::from(Serde(messages)), tools => none(), documents => none(),
            add_generation_prompt => false, ..Jinja::from(Serde(&self.special))
        };
        template.render(given).map_err(|error| abridge(&format!("the chat template refuses it: {error}")))
    }
}

/// `tojson` of transformers: Python's `json.dumps`, without escapes for HTML.
fn to_json(value: Jinja, arguments: Kwargs) -> Result<Jinja, Error> {
    let failed = |error: serde_json::Error| Error::new(ErrorKind::BadSerialization, error.to_string());
    let indent: Option<usize> = arguments.get("indent")?;
    let mut text = Vec::new();
    match indent {
        None => value.serialize(&mut Serializer::with_formatter(&mut text, Spaced)).map_err(failed)?,
        Some(indent) => {
            let spaces = " ".repeat(indent.min(64));
            let pretty = PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut Serializer::with_formatter(&mut text, pretty)).map_err(failed)?;
        }
    }
    Ok(Jinja::from_safe_string(String::from_utf8(text).expect("JSON is UTF-8")))
}

/// Spaces after commas and colons.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, writer: &mut W) -> io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Templates, chats and what transformers makes of them: `tests/golden/make_chats.py`.
    const GOLDEN: &str = include_str!("../assets/chats.json");

    #[test]
    fn chats_are_rendered_as_transformers_renders_them() {
        let cases: Vec<Value> = serde_json::from_str(GOLDEN).unwrap();
        assert!(cases.len() >= 8);
        for case in cases {
            let renderer = ChatRenderer::new(case["template"].as_str().unwrap().into(), &case["config"]);
            let rendered = renderer.unwrap().render(case["messages"].as_array().unwrap());
            assert_eq!(rendered.as_deref(), Ok(case["expected"].as_str().unwrap()), "{}", case["name"]);
        }
    }

    #[test]
    fn what_a_template_refuses_or_asks_for_is_said() {
        let refused = |template: &str| {
            ChatRenderer::new(template.into(), &Value::Null)
                .and_then(|renderer| renderer.render(&[]))
                .unwrap_err()
        };
        assert!(refused("{{ raise_exception('roles must alternate') }}").contains("roles must alternate"));
        assert!(refused("{{ strftime_now('%Y') }}").contains("the date"));
        assert!(refused("{% if %}").len() < 1000);
    }
}
