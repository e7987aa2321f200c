//! Filling text assets: `{{ key }}` becomes a value. Nothing is escaped, and a value is never searched for keys.

use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, Environment, UndefinedBehavior};
use std::collections::BTreeMap;

/// Fills a template that is part of the program.
///
/// # Panics
/// If the template names a key without a value, or is no template.
pub fn fill(template: &str, values: &[(&str, &str)]) -> String {
    let mut environment = Environment::empty();
    let syntax = SyntaxConfig::builder().keep_trailing_newline(true).build();
    environment.set_syntax(syntax.expect("the usual delimiters"));
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    let owned = |&(key, value): &(&str, &str)| (key.to_owned(), value.to_owned());
    let values: BTreeMap<String, String> = values.iter().map(owned).collect();
    environment.render_str(template, values).expect("a template of this program, with a value for every key")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_stay_as_they_are_and_are_not_searched_for_keys() {
        let filled = fill("a {{ x }} {y} <b>\n", &[("x", "{{ y }}{% if %}&<\"\n"), ("y", "no")]);
        assert_eq!(filled, "a {{ y }}{% if %}&<\"\n {y} <b>\n");
    }

    #[test]
    #[should_panic(expected = "a value for every key")]
    fn a_key_without_a_value_is_not_left_empty() {
        fill("{{ x }}", &[("y", "")]);
    }
}
