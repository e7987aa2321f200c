//! One name, one public type: a reader who sees `Report` need not ask which.

use super::known::Violation;
use super::syntax::Crate;
use std::collections::BTreeMap;
use syn::{Ident, Item, Visibility};

/// Names under which libraries of the workspace make more than one type or trait public.
pub(super) fn find(crates: &[Crate]) -> Vec<Violation> {
    let mut places: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for module in crates.iter().filter(|of| of.is_library).flat_map(|of| &of.modules) {
        for name in module.items.iter().filter_map(public_type) {
            places.entry(name.to_string()).or_default().push(&module.file);
        }
    }
    let shared = places.into_iter().filter(|(_, files)| files.len() > 1);
    shared
        .map(|(name, files)| Violation {
            message: format!("`{name}` is the name of {} public types: {}", files.len(), files.join(", ")),
            key: name,
        })
        .collect()
}

fn public_type(item: &Item) -> Option<&Ident> {
    let (visibility, name) = match item {
        Item::Enum(item) => (&item.vis, &item.ident),
        Item::Struct(item) => (&item.vis, &item.ident),
        Item::Trait(item) => (&item.vis, &item.ident),
        Item::Type(item) => (&item.vis, &item.ident),
        Item::Union(item) => (&item.vis, &item.ident),
        _ => return None,
    };
    matches!(visibility, Visibility::Public(_)).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::super::syntax::of_texts;
    use super::*;

    #[test]
    fn two_public_types_of_one_name_are_found_and_private_ones_are_not() {
        let one = of_texts("one", &[("lib.rs", "pub struct Report; pub struct Own; pub fn f() {}")]);
        let two = of_texts(
            "two",
            &[
                ("lib.rs", "mod a; pub use a::Report; struct Own; pub fn f() {}"),
                ("a.rs", "pub enum Report {}"),
            ],
        );
        let tool = of_texts("tool", &[("main.rs", "pub struct Own;")]);
        let found: Vec<String> = find(&[one, two, tool]).into_iter().map(|found| found.key).collect();
        assert_eq!(found, ["Report"]);
    }
}
