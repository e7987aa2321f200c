//! Libraries do not know the command line: no string of theirs names a flag. They return what happened; the tool says which
//! flag helps.

use super::known::Violation;
use super::syntax::{Crate, is_test};
use proc_macro2::{TokenStream, TokenTree};
use syn::visit::{self, Visit};
use syn::{Attribute, Lit, LitStr, Meta};

/// Crates that are a command line themselves, or are started by one of this repository only.
const COMMAND_LINES: [&str; 4] = ["lowrank-cli", "lowrank-bench", "lowrank-fuzz", "xtask"];

/// Files whose flags are those of another program.
const FOREIGN_FLAGS: [(&str, &str); 1] =
    [("crates/lowrank-compute/src/cuda/kernels.rs", "options of NVIDIA's run-time compiler")];

/// Strings outside of tests and documentation that hold `--name`.
pub(super) fn find(crates: &[Crate]) -> Vec<Violation> {
    let mut found = Vec::new();
    for of in crates.iter().filter(|of| !COMMAND_LINES.contains(&of.name.as_str())) {
        let foreign = |file: &str| FOREIGN_FLAGS.iter().any(|(known, _)| *known == file);
        for module in of.modules.iter().filter(|module| !foreign(&module.file)) {
            let mut strings = Strings::default();
            module.items.iter().for_each(|item| strings.visit_item(item));
            for text in strings.found {
                found.extend(flags(&text).into_iter().map(|flag| Violation {
                    key: format!("{} {flag}", module.file),
                    message: format!("{}: a library's text names the flag {flag}: {text:?}", module.file),
                }));
            }
        }
    }
    found.sort_by(|a, b| a.key.cmp(&b.key));
    found.dedup();
    found
}

/// `--name` in a text, at its beginning or after something that is no part of a word.
fn flags(text: &str) -> Vec<&str> {
    let bytes = text.as_bytes();
    let starts = text.match_indices("--").map(|(at, _)| at);
    starts
        .filter(|&at| at == 0 || !matches!(bytes[at - 1], b'-' | b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z'))
        .filter_map(|at| {
            let name = &text[at + 2..];
            let end = name.find(|c: char| !(c.is_ascii_lowercase() || c == '-')).unwrap_or(name.len());
            name.starts_with(|c: char| c.is_ascii_lowercase()).then(|| &text[at..at + 2 + end])
        })
        .collect()
}

/// The string literals of some code.
#[derive(Default)]
struct Strings {
    found: Vec<String>,
}

impl<'ast> Visit<'ast> for Strings {
    fn visit_lit_str(&mut self, literal: &'ast LitStr) {
        self.found.push(literal.value());
    }

    fn visit_attribute(&mut self, attribute: &'ast Attribute) {
        // `#[error("…")]` is a message; `#[doc = "…"]` is documentation.
        if let Meta::List(list) = &attribute.meta {
            self.tokens(list.tokens.clone());
        }
    }

    fn visit_macro(&mut self, called: &'ast syn::Macro) {
        self.tokens(called.tokens.clone());
    }

    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        if !is_test(&item.attrs) {
            visit::visit_item_fn(self, item);
        }
    }

    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        if !is_test(&item.attrs) {
            visit::visit_impl_item_fn(self, item);
        }
    }
}

impl Strings {
    fn tokens(&mut self, tokens: TokenStream) {
        for token in tokens {
            match token {
                TokenTree::Group(group) => self.tokens(group.stream()),
                TokenTree::Literal(literal) => {
                    if let Lit::Str(text) = Lit::new(literal) {
                        self.found.push(text.value());
                    }
                }
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::syntax::of_texts;
    use super::*;

    fn found(name: &str, text: &str) -> Vec<String> {
        find(&[of_texts(name, &[("src/lib.rs", text)])]).into_iter().map(|found| found.key).collect()
    }

    #[test]
    fn flags_are_found_in_messages_of_libraries() {
        for text in [
            "fn f() -> &'static str { \"use --device cpu\" }",
            "fn f() { panic!(\"{}; `--device` says where\", 1) }",
            "#[derive(Error)] enum E { #[error(\"no GPU; --device=cpu needs none\")] None }",
            "const HINT: &str = \"--device\";",
            "fn f() { g(vec![\"--device\"]) }",
        ] {
            assert_eq!(found("one", text), ["src/lib.rs --device"], "{text}");
        }
        assert_eq!(found("lowrank-cli", "const HINT: &str = \"--device\";"), [""; 0]);
    }

    #[test]
    fn dashes_documentation_and_tests_are_no_flags() {
        for text in [
            "/// As --device says.\nfn f() -> &'static str { \"a -- b, 1--2, ---, a--b, --1\" }",
            "#[cfg(test)] mod tests { const HINT: &str = \"--device\"; }",
            "struct S; impl S { #[cfg(test)] fn f() -> &'static str { \"--device\" } }",
            "// \"--device\"\n",
        ] {
            assert_eq!(found("one", text), [""; 0], "{text}");
        }
    }
}
