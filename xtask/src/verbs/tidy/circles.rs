//! No import circles: within a crate, modules form a directed graph without a way back.
//!
//! A module is a file here; inline modules belong to theirs. Module a points to module b if a imports or names something that b
//! defines, wherever it is re-exported. A parent that declares and re-exports its children points to none of them by that alone.

use super::known::Violation;
use super::paths::Scope;
use super::syntax::Crate;
use std::collections::BTreeSet;

/// Sets of modules of which each leads to each other.
pub(super) fn find(crates: &[Crate]) -> Vec<Violation> {
    crates.iter().flat_map(in_crate).collect()
}

fn in_crate(of: &Crate) -> Vec<Violation> {
    let edges = edges(of);
    let reached: Vec<BTreeSet<usize>> = (0..edges.len()).map(|from| reached(&edges, from)).collect();
    let mut found = Vec::new();
    let mut done: BTreeSet<usize> = BTreeSet::new();
    for module in 0..edges.len() {
        if done.contains(&module) || !reached[module].contains(&module) {
            continue;
        }
        let circle: Vec<usize> =
            reached[module].iter().copied().filter(|&other| reached[other].contains(&module)).collect();
        done.extend(&circle);
        let name = |module: usize| match of.modules[module].path.as_slice() {
            [] => "crate".to_owned(),
            path => path.join("::"),
        };
        let names: Vec<String> = circle.iter().map(|&module| name(module)).collect();
        let within: Vec<String> = circle
            .iter()
            .flat_map(|&from| edges[from].iter().map(move |&to| (from, to)))
            .filter(|(_, to)| circle.contains(to))
            .map(|(from, to)| format!("{} → {}", name(from), name(to)))
            .collect();
        let key = format!("{}: {}", of.name, names.join(", "));
        found.push(Violation {
            message: format!("{key} use each other in a circle: {}", within.join("; ")),
            key,
        });
    }
    found
}

/// For every module that is a file, the other files it uses.
fn edges(of: &Crate) -> Vec<BTreeSet<usize>> {
    let scope = Scope::new(of);
    let mut edges = vec![BTreeSet::new(); of.modules.len()];
    for (index, module) in of.modules.iter().enumerate() {
        let from = module.file_module;
        let to = scope.uses(index).into_iter().map(|used| of.modules[used].file_module);
        edges[from].extend(to.filter(|&to| to != from));
    }
    edges
}

fn reached(edges: &[BTreeSet<usize>], from: usize) -> BTreeSet<usize> {
    let mut seen = BTreeSet::new();
    let mut queue = vec![from];
    while let Some(at) = queue.pop() {
        queue.extend(edges[at].iter().copied().filter(|&next| seen.insert(next)));
    }
    seen
}

#[cfg(test)]
mod tests {
    use super::super::syntax::of_texts;
    use super::*;

    fn circles(files: &[(&str, &str)]) -> Vec<String> {
        find(&[of_texts("one", files)]).into_iter().map(|found| found.key).collect()
    }

    const NONE: [&str; 0] = [];

    #[test]
    fn two_files_that_use_each_other_are_a_circle_however_they_say_it() {
        let lib = "mod a; mod b; pub use a::A; pub use b::B;";
        let a = "use crate::B; pub struct A; pub fn a(_: B) {}";
        for b in [
            "use crate::A; pub struct B; fn b(_: A) {}",
            "use super::a::A as Other; pub struct B; fn b(_: Other) {}",
            "pub struct B; fn b() { crate::a::a(B); }",
            "use crate::a; pub struct B; fn b() { a::a(B); }",
            "use super::*; pub struct B; fn b(_: A) {}",
            "pub struct B; fn b() { println!(\"{}\", crate::a::SIZE); }",
            "mod inner { pub fn b(_: super::super::A) {} } pub struct B;",
            "pub struct B; impl From<crate::A> for B { fn from(_: crate::A) -> Self { B } }",
        ] {
            assert_eq!(circles(&[("lib.rs", lib), ("a.rs", a), ("b.rs", b)]), ["one: a, b"], "{b}");
        }
    }

    #[test]
    fn a_chain_is_none() {
        let files = [
            ("lib.rs", "mod a; mod b; mod c; pub use a::A; pub use b::B;"),
            ("a.rs", "pub struct A; use std::fmt;"),
            ("b.rs", "use crate::A; pub struct B(A); #[cfg(test)] mod tests { use crate::c::c; }"),
            ("c.rs", "use crate::{A, B}; pub fn c(_: A, _: B) { super::b::made_by_a_macro(); }"),
        ];
        assert_eq!(circles(&files), NONE);
    }

    #[test]
    fn a_parent_may_declare_and_re_export_but_not_use_a_child_that_uses_it() {
        let child = ("a/child.rs", "pub struct Child(super::Parent);");
        let only_exports = "mod child; pub use child::Child; pub struct Parent;";
        assert_eq!(circles(&[("lib.rs", "mod a;"), ("a.rs", only_exports), child]), NONE);
        for uses in [
            "mod child; use child::Child; pub struct Parent;",
            "mod child; pub struct Parent; fn f() { child::g() }",
            "mod child; pub use child::Child; pub struct Parent; fn f(_: Child) {}",
        ] {
            assert_eq!(
                circles(&[("lib.rs", "mod a;"), ("a.rs", uses), child]),
                ["one: a, a::child"],
                "{uses}"
            );
        }
    }

    #[test]
    fn the_root_is_a_module_as_any_other() {
        let files =
            [("main.rs", "mod a; struct Cli; fn main() { a::run(Cli) }"), ("a.rs", "use crate::Cli;")];
        assert_eq!(circles(&files), ["one: crate, a"]);
    }

    #[test]
    fn what_other_crates_and_variables_are_called_is_no_use() {
        let files = [
            ("lib.rs", "mod a; mod b; pub use b::value;"),
            ("a.rs", "use b::c; use c; use a as other; pub fn a(b: usize) -> usize { b + b::c }"),
            ("b.rs", "pub fn value() -> usize { crate::a::a(1) }"),
        ];
        assert_eq!(circles(&files), NONE);
    }
}
