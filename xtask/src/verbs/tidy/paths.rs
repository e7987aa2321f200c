//! Which module a path leads to: imports, re-exports and globs within one crate are followed to the definition.

use super::syntax::Crate;
use proc_macro2::{TokenStream, TokenTree};
use std::collections::{BTreeMap, BTreeSet};
use syn::visit::{self, Visit};
use syn::{Item, ItemUse, UseTree, Visibility};

/// A `use` of a module, flattened to one name.
#[derive(Debug, Clone)]
struct Import {
    path: Vec<String>,
    is_public: bool,
}

/// The names of one module.
#[derive(Debug, Default)]
struct Names {
    defined: BTreeSet<String>,
    imports: BTreeMap<String, Vec<Import>>,
    globs: Vec<Import>,
}

/// The names of every module of a crate.
pub(super) struct Scope<'a> {
    of: &'a Crate,
    names: Vec<Names>,
}

/// Re-exports that lead in circles are cut off here.
const DEPTH_MAX: usize = 16;

impl<'a> Scope<'a> {
    pub(super) fn new(of: &'a Crate) -> Self {
        let names = of.modules.iter().map(|module| names(&module.items)).collect();
        Self { of, names }
    }

    /// The modules that a module uses: those which define what it imports or names by a path.
    ///
    /// A public `use` of something below the module is a re-export, and no use by itself.
    pub(super) fn uses(&self, module: usize) -> BTreeSet<usize> {
        let mut found = BTreeSet::new();
        let names = &self.names[module];
        for import in names.imports.values().flatten().chain(&names.globs) {
            let targets = self.targets(module, &import.path, 0);
            let is_below = |target: &usize| self.is_below(*target, module);
            found.extend(targets.into_iter().filter(|target| !(import.is_public && is_below(target))));
        }
        let mut paths = Paths::default();
        self.of.modules[module].items.iter().for_each(|item| paths.visit_item(item));
        for path in &paths.found {
            found.extend(self.targets(module, path, 0));
        }
        found
    }

    /// Whether a module is declared somewhere within another.
    fn is_below(&self, mut module: usize, above: usize) -> bool {
        while let Some(parent) = self.of.modules[module].parent {
            if parent == above {
                return true;
            }
            module = parent;
        }
        false
    }

    /// The modules that define what a path means in a module; none for what is of other crates, or local.
    fn targets(&self, module: usize, path: &[String], depth: usize) -> BTreeSet<usize> {
        let mut at = module;
        let mut rest = path;
        let mut anchored = false;
        while let Some((first, after)) = rest.split_first() {
            at = match first.as_str() {
                "crate" => 0,
                "self" => at,
                "super" => self.of.modules[at].parent.unwrap_or(0),
                _ => break,
            };
            anchored = true;
            rest = after;
        }
        self.walk(at, rest, anchored, depth)
    }

    /// `anchored`: the names must be of this crate, so that what is not found was made by a macro of the module.
    fn walk(&self, at: usize, rest: &[String], anchored: bool, depth: usize) -> BTreeSet<usize> {
        let Some((name, after)) = rest.split_first() else { return BTreeSet::from([at]) };
        if depth > DEPTH_MAX {
            return BTreeSet::new();
        }
        let names = &self.names[at];
        if let Some(&child) = self.of.modules[at].children.get(name) {
            return self.walk(child, after, true, depth + 1);
        }
        if names.defined.contains(name) {
            return BTreeSet::from([at]);
        }
        if let Some(imports) = names.imports.get(name) {
            let through = imports.iter().flat_map(|import| {
                let path: Vec<String> = import.path.iter().chain(after).cloned().collect();
                // `use name::…` of another crate with the name of this very import.
                if path.first() == Some(name) { BTreeSet::new() } else { self.targets(at, &path, depth + 1) }
            });
            return through.collect();
        }
        for glob in &names.globs {
            for target in self.targets(at, &glob.path, depth + 1) {
                if self.knows(target, name) {
                    return self.walk(target, rest, true, depth + 1);
                }
            }
        }
        if anchored { BTreeSet::from([at]) } else { BTreeSet::new() }
    }

    fn knows(&self, module: usize, name: &String) -> bool {
        let names = &self.names[module];
        names.defined.contains(name)
            || names.imports.contains_key(name)
            || self.of.modules[module].children.contains_key(name)
    }
}

fn names(items: &[Item]) -> Names {
    let mut names = Names::default();
    for item in items {
        let defined = match item {
            Item::Const(item) => &item.ident,
            Item::Enum(item) => &item.ident,
            Item::Fn(item) => &item.sig.ident,
            Item::Static(item) => &item.ident,
            Item::Struct(item) => &item.ident,
            Item::Trait(item) => &item.ident,
            Item::Type(item) => &item.ident,
            Item::Union(item) => &item.ident,
            Item::Use(item) => {
                import(item, &mut names);
                continue;
            }
            _ => continue,
        };
        names.defined.insert(defined.to_string());
    }
    names
}

fn import(item: &ItemUse, names: &mut Names) {
    if item.leading_colon.is_none() {
        flatten(&item.tree, Vec::new(), !matches!(item.vis, Visibility::Inherited), names);
    }
}

fn flatten(tree: &UseTree, mut path: Vec<String>, is_public: bool, names: &mut Names) {
    match tree {
        UseTree::Path(tree) => {
            path.push(tree.ident.to_string());
            flatten(&tree.tree, path, is_public, names);
        }
        UseTree::Group(group) => {
            group.items.iter().for_each(|tree| flatten(tree, path.clone(), is_public, names));
        }
        UseTree::Glob(_) => names.globs.push(Import { path, is_public }),
        UseTree::Name(name) => {
            let name = name.ident.to_string();
            // `use a::b::{self}` imports b.
            if name == "self" {
                let name = path.last().cloned().unwrap_or_default();
                names.imports.entry(name).or_default().push(Import { path, is_public });
            } else {
                path.push(name.clone());
                names.imports.entry(name).or_default().push(Import { path, is_public });
            }
        }
        UseTree::Rename(rename) => {
            if rename.ident != "self" {
                path.push(rename.ident.to_string());
            }
            names.imports.entry(rename.rename.to_string()).or_default().push(Import { path, is_public });
        }
    }
}

/// Every path of some code but those of its imports, macros' arguments included.
#[derive(Default)]
struct Paths {
    found: BTreeSet<Vec<String>>,
}

impl<'ast> Visit<'ast> for Paths {
    fn visit_item_use(&mut self, _: &'ast ItemUse) {}

    fn visit_path(&mut self, path: &'ast syn::Path) {
        if path.leading_colon.is_none() {
            self.found.insert(path.segments.iter().map(|segment| segment.ident.to_string()).collect());
        }
        visit::visit_path(self, path);
    }

    // The path of a visibility, `pub(in crate::a)`, uses nothing.
    fn visit_visibility(&mut self, _: &'ast Visibility) {}

    // What an attribute names is of a derive or the compiler; what it quotes is no path.
    fn visit_attribute(&mut self, _: &'ast syn::Attribute) {}

    fn visit_macro(&mut self, called: &'ast syn::Macro) {
        self.tokens(called.tokens.clone());
    }
}

impl Paths {
    /// Runs of `a::b::c` among tokens.
    fn tokens(&mut self, tokens: TokenStream) {
        let mut path: Vec<String> = Vec::new();
        let mut colons = 0;
        for token in tokens {
            match token {
                TokenTree::Ident(ident) if colons == 2 => path.push(ident.to_string()),
                TokenTree::Ident(ident) => {
                    self.end(&mut path);
                    path.push(ident.to_string());
                }
                TokenTree::Punct(punct) if punct.as_char() == ':' && colons < 2 => {
                    colons += 1;
                    continue;
                }
                TokenTree::Group(group) => {
                    self.end(&mut path);
                    self.tokens(group.stream());
                }
                _ => self.end(&mut path),
            }
            colons = 0;
        }
        self.end(&mut path);
    }

    fn end(&mut self, path: &mut Vec<String>) {
        // A single name in a macro may be anything: a field, a literal's prefix, a variable.
        if path.len() > 1 {
            self.found.insert(std::mem::take(path));
        }
        path.clear();
    }
}
