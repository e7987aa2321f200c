//! Violations that stood when their rule was written. These lists only shrink: an entry that is no longer needed fails the check.

/// Import circles, each by its crate and its modules.
pub(super) const CIRCLES: &[&str] = &[];

/// Type names that more than one crate exports.
pub(super) const TYPE_NAMES: &[&str] = &[];

/// Messages of libraries that name a flag, by file and flag.
pub(super) const MESSAGES: &[&str] = &[];

/// What a rule found and how it identifies it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Violation {
    /// As it is written in the lists above.
    pub(super) key: String,
    /// One line for a person.
    pub(super) message: String,
}

/// Messages for the violations that are not known, and for the known ones that are gone.
pub(super) fn except(found: Vec<Violation>, known: &[&str], list: &str) -> Vec<String> {
    let gone = known.iter().filter(|known| found.iter().all(|found| found.key != **known));
    let gone = gone
        .map(|known| format!("{known}: no longer found; take it off the known {list} of xtask's tidy"))
        .collect::<Vec<_>>();
    let new = found.into_iter().filter(|found| !known.contains(&found.key.as_str()));
    new.map(|found| found.message).chain(gone).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_violations_pass_until_they_are_gone() {
        let found = |key: &str| Violation { key: key.into(), message: format!("{key} is wrong") };
        assert_eq!(except(vec![found("a"), found("b")], &["b"], "things"), ["a is wrong"]);
        let left = except(vec![], &["b"], "things");
        assert!(left.len() == 1 && left[0].contains("take it off"), "{left:?}");
    }
}
