//! The workspace as syntax trees: every crate's modules, test code left out.

use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use syn::{Attribute, Item, Meta, Token, punctuated::Punctuated};

/// One compiled root: a library, a binary, and every file that it declares.
pub(super) struct Crate {
    /// The package, and the file of the root where the package has several.
    pub(super) name: String,
    /// Whether other packages can depend on it.
    pub(super) is_library: bool,
    /// The root first.
    pub(super) modules: Vec<Module>,
}

/// A module, inline or in a file.
pub(super) struct Module {
    /// Where it is declared; the root has none.
    pub(super) parent: Option<usize>,
    /// Names from the root.
    pub(super) path: Vec<String>,
    /// The module whose file holds it: itself, or for an inline module an ancestor.
    pub(super) file_module: usize,
    /// Relative to the repository.
    pub(super) file: String,
    /// Child modules by name.
    pub(super) children: BTreeMap<String, usize>,
    /// Everything else, without test code and child modules.
    pub(super) items: Vec<Item>,
}

/// All crates of the workspace, each read from its root down.
pub(super) fn workspace(root: &Path) -> Result<Vec<Crate>> {
    let mut packages = vec![root.join("xtask")];
    for entry in std::fs::read_dir(root.join("crates"))? {
        packages.push(entry?.path());
    }
    packages.sort();
    let mut crates = Vec::new();
    for package in packages.iter().filter(|package| package.join("Cargo.toml").is_file()) {
        let name = package.file_name().unwrap_or_default().to_string_lossy();
        let mut roots = vec![(package.join("src/lib.rs"), true), (package.join("src/main.rs"), false)];
        for program in std::fs::read_dir(package.join("src/bin")).into_iter().flatten() {
            let program = program?.path();
            let is_folder = program.is_dir();
            roots.push((if is_folder { program.join("main.rs") } else { program }, false));
        }
        for (file, is_library) in roots.into_iter().filter(|(file, _)| file.is_file()) {
            let read = |path: &Path| std::fs::read_to_string(path).ok();
            crates.push(
                parse(&name, is_library, root, &file, &read)
                    .with_context(|| format!("in {}", file.display()))?,
            );
        }
    }
    Ok(crates)
}

/// Reads one crate from its root; `read` gives the text of a file, or nothing where there is none.
pub(super) fn parse(
    name: &str,
    is_library: bool,
    repository: &Path,
    file: &Path,
    read: &dyn Fn(&Path) -> Option<String>,
) -> Result<Crate> {
    let mut reader = Reader { repository, read, modules: Vec::new() };
    let folder = file.parent().unwrap_or(Path::new("")).to_path_buf();
    reader.file(None, Vec::new(), file, &folder)?;
    Ok(Crate { name: name.into(), is_library, modules: reader.modules })
}

struct Reader<'a> {
    repository: &'a Path,
    read: &'a dyn Fn(&Path) -> Option<String>,
    modules: Vec<Module>,
}

impl Reader<'_> {
    /// A module in a file, whose children are in `folder`.
    fn file(
        &mut self,
        parent: Option<usize>,
        path: Vec<String>,
        file: &Path,
        folder: &Path,
    ) -> Result<usize> {
        let text = (self.read)(file).with_context(|| format!("no file {}", file.display()))?;
        let parsed = syn::parse_file(&text).with_context(|| format!("cannot parse {}", file.display()))?;
        self.module(parent, path, None, (file, folder), parsed.items)
    }

    fn module(
        &mut self,
        parent: Option<usize>,
        path: Vec<String>,
        file_module: Option<usize>,
        (file, folder): (&Path, &Path),
        items: Vec<Item>,
    ) -> Result<usize> {
        let own = self.modules.len();
        let relative = file.strip_prefix(self.repository).unwrap_or(file).display().to_string();
        let file_module = file_module.unwrap_or(own);
        self.modules.push(Module {
            parent,
            path: path.clone(),
            file_module,
            file: relative,
            children: BTreeMap::new(),
            items: Vec::new(),
        });
        for item in items {
            if is_test(attributes(&item)) {
                continue;
            }
            let Item::Mod(child) = item else {
                self.modules[own].items.push(item);
                continue;
            };
            let name = child.ident.to_string();
            let mut child_path = path.clone();
            child_path.push(name.clone());
            let below = folder.join(&name);
            let index = match child.content {
                Some((_, items)) => {
                    self.module(Some(own), child_path, Some(file_module), (file, &below), items)?
                }
                None => {
                    let beside: PathBuf = folder.join(format!("{name}.rs"));
                    let within = below.join("mod.rs");
                    let file = if (self.read)(&beside).is_some() { beside } else { within };
                    self.file(Some(own), child_path, &file, &below)?
                }
            };
            self.modules[own].children.insert(name, index);
        }
        Ok(own)
    }
}

/// The attributes of an item.
pub(super) fn attributes(item: &Item) -> &[Attribute] {
    match item {
        Item::Const(item) => &item.attrs,
        Item::Enum(item) => &item.attrs,
        Item::ExternCrate(item) => &item.attrs,
        Item::Fn(item) => &item.attrs,
        Item::ForeignMod(item) => &item.attrs,
        Item::Impl(item) => &item.attrs,
        Item::Macro(item) => &item.attrs,
        Item::Mod(item) => &item.attrs,
        Item::Static(item) => &item.attrs,
        Item::Struct(item) => &item.attrs,
        Item::Trait(item) => &item.attrs,
        Item::TraitAlias(item) => &item.attrs,
        Item::Type(item) => &item.attrs,
        Item::Union(item) => &item.attrs,
        Item::Use(item) => &item.attrs,
        _ => &[],
    }
}

/// Whether attributes say `#[test]`, `#[cfg(test)]` or `#[cfg(all(test, …))]`.
pub(super) fn is_test(attributes: &[Attribute]) -> bool {
    fn needs_test(meta: &Meta) -> bool {
        match meta {
            Meta::Path(path) => path.is_ident("test"),
            Meta::List(list) if list.path.is_ident("all") => list
                .parse_args_with(Punctuated::<Meta, Token![,]>::parse_terminated)
                .is_ok_and(|all| all.iter().any(needs_test)),
            _ => false,
        }
    }
    attributes.iter().any(|attribute| match &attribute.meta {
        Meta::Path(path) => path.is_ident("test"),
        Meta::List(list) if list.path.is_ident("cfg") => {
            list.parse_args::<Meta>().is_ok_and(|meta| needs_test(&meta))
        }
        _ => false,
    })
}

/// A crate of these files, for the tests of rules.
#[cfg(test)]
pub(super) fn of_texts(name: &str, files: &[(&str, &str)]) -> Crate {
    let read = |path: &Path| {
        files.iter().find(|(file, _)| Path::new(file) == path).map(|(_, text)| (*text).to_owned())
    };
    let root = files[0].0;
    parse(name, root.ends_with("lib.rs"), Path::new(""), Path::new(root), &read).unwrap()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_found_by_their_declarations_and_tests_left_out() {
        let found = of_texts(
            "one",
            &[
                ("src/lib.rs", "mod a; mod b { pub mod c { pub struct C; } } #[cfg(test)] mod tests;"),
                (
                    "src/a/mod.rs",
                    "mod deep; #[cfg(all(test, unix))] fn only_for_tests() {} #[cfg(unix)] fn f() {}",
                ),
                ("src/a/deep.rs", "pub(super) struct Deep;"),
            ],
        );
        let seen: Vec<(String, &str, usize)> =
            found.modules.iter().map(|m| (m.path.join("::"), m.file.as_str(), m.items.len())).collect();
        let expected = [
            ("", "src/lib.rs", 0),
            ("a", "src/a/mod.rs", 1),
            ("a::deep", "src/a/deep.rs", 1),
            ("b", "src/lib.rs", 0),
            ("b::c", "src/lib.rs", 1),
        ];
        assert_eq!(seen, expected.map(|(path, file, items)| (path.to_owned(), file, items)));
        assert_eq!(found.modules[4].file_module, 0);
    }

    #[test]
    fn a_file_that_is_declared_and_missing_is_an_error() {
        let read = |path: &Path| (path == Path::new("src/lib.rs")).then(|| "mod gone;".to_owned());
        assert!(parse("one", true, Path::new(""), Path::new("src/lib.rs"), &read).is_err());
    }
}
