//! `~` where the shell left it: in quotes, after `--flag=`, and in config files. It means what it means to a shell, so that
//! no folder named `~` appears; the one place that knows this.

use crate::exit::{Failure, usage};
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

/// The words of the command line, with `~` and `~/…` replaced by the home folder, also after `--flag=`.
pub(crate) fn expand_words(words: impl Iterator<Item = OsString>) -> Result<Vec<OsString>, Failure> {
    let home = home();
    words.map(|word| expand_word(word, home.as_deref())).collect()
}

/// The same in every text of a config.
pub(crate) fn expand_values(value: &mut toml::Value) -> Result<(), Failure> {
    match value {
        toml::Value::String(text) => *text = expand(text, home().as_deref())?,
        toml::Value::Array(values) => values.iter_mut().try_for_each(expand_values)?,
        toml::Value::Table(table) => {
            table.iter_mut().map(|(_, value)| value).try_for_each(expand_values)?;
        }
        _ => {}
    }
    Ok(())
}

fn home() -> Option<PathBuf> {
    std::env::home_dir().filter(|home| !home.as_os_str().is_empty())
}

fn expand_word(word: OsString, home: Option<&Path>) -> Result<OsString, Failure> {
    // What is not UTF-8 begins with no flag of ours, and no `~` was typed there.
    let Some(text) = word.to_str() else { return Ok(word) };
    let (flag, value) = match text.split_once('=') {
        Some((flag, value)) if flag.starts_with("--") => (&text[..flag.len() + 1], value),
        _ => ("", text),
    };
    Ok([flag, &expand(value, home)?].concat().into())
}

fn expand(text: &str, home: Option<&Path>) -> Result<String, Failure> {
    let Some(rest) = text.strip_prefix('~') else { return Ok(text.to_owned()) };
    let refused = |why: &str| usage(format!("`{}`: {why}", lowrank_model::display::clip(text)));
    if rest.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_') {
        return Err(refused(
            "`~` of another user is not known here; give the full path, or ./~… for a name that begins so",
        ));
    }
    if !(rest.is_empty() || rest.starts_with('/')) {
        return Ok(text.to_owned());
    }
    let home = home.and_then(|home| OsStr::new(home).to_str());
    let home =
        home.ok_or_else(|| refused("the home folder is not known (HOME is not set); give the full path"))?;
    Ok([home, rest].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tilde_means_what_it_means_to_a_shell() {
        let expand = |word: &str| {
            let word =
                expand_word(word.into(), Some(Path::new("/home/me"))).map_err(|error| error.to_string());
            word.map(|word| word.into_string().unwrap())
        };
        for (word, meant) in [
            ("~", "/home/me"),
            ("~/models/x y", "/home/me/models/x y"),
            ("--out=~/x", "--out=/home/me/x"),
            ("--out=a/~/x", "--out=a/~/x"),
            ("a=~/x", "a=~/x"),
            ("./~/x", "./~/x"),
            ("~$x.docx", "~$x.docx"),
            ("20%", "20%"),
        ] {
            assert_eq!(expand(word).unwrap(), meant);
        }
        for word in ["~me/x", "--cache=~root"] {
            assert!(expand(word).unwrap_err().contains("another user"), "{word}");
        }
        assert!(expand_word("~/x".into(), None).is_err());
    }

    #[test]
    fn configs_are_expanded_however_deep() {
        let mut value: toml::Value = toml::from_str("a = [\"~root/x\"]\nb = 1").unwrap();
        assert!(expand_values(&mut value).is_err());
        let mut value: toml::Value = toml::from_str("a = [[\"x~/y\"]]\n[b]\nc = \"~/z\"").unwrap();
        expand_values(&mut value).unwrap();
        assert_eq!(value["a"][0][0].as_str(), Some("x~/y"));
        assert_eq!(value["b"]["c"].as_str(), home().unwrap().join("z").to_str());
    }
}
