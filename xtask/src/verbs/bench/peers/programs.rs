//! What is compared: published programs, and this project's own rows.

use std::path::Path;

/// A way to compress.
pub(crate) struct Program {
    /// Name of its results' files; `--peer` finds it by a part of this.
    pub(crate) key: &'static str,
    /// Name in the table.
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
}

pub(crate) enum Kind {
    /// This project's program with these flags.
    Ours(&'static str),
    Published(Published),
}

/// Where a published program is.
pub(crate) struct Published {
    /// On GitHub.
    pub(crate) repository: &'static str,
    /// That its driver was written for.
    pub(crate) commit: &'static str,
    pub(crate) licence: &'static str,
    /// In `tests/bench/peers`.
    pub(crate) driver: &'static str,
}

impl Published {
    /// The folder that `git clone` makes.
    pub(crate) fn folder(&self) -> &'static str {
        self.repository.split_once('/').map_or(self.repository, |(_, name)| name)
    }

    /// What gets it.
    pub(crate) fn clone_command(&self, sources: &Path) -> String {
        let (place, Self { repository, commit, .. }) = (sources.join(self.folder()), self);
        format!(
            "git clone https://github.com/{repository} {0} && git -C {0} checkout {commit}",
            place.display()
        )
    }
}

/// All rows of a table, from top to bottom.
pub(crate) const PROGRAMS: [Program; 9] = [
    ours("ours-default", "lowrank-compress, default", ""),
    ours("ours-widths", "lowrank-compress, widths alone", "--structures width"),
    ours("ours-ranks", "lowrank-compress, ranks alone", "--structures rank"),
    published(
        "heapr",
        "HEAPr (channels, by gradients)",
        Published {
            repository: "LLIKKE/HEAPr",
            commit: "9c101aa96e3f222cd5109eb884eee614f479550b",
            licence: "CC BY-NC 4.0",
            driver: "run_heapr.py",
        },
    ),
    published(
        "mobe",
        "MoBE (mixed bases, trained on the weights)",
        Published {
            repository: "inclusionAI/MoBE",
            commit: "7f3501da2a9f7b12d773cb52c454a0be0ceeb185",
            licence: "none stated",
            driver: "run_mobe.py",
        },
    ),
    published(
        "d2-moe",
        "D²-MoE (a mean and low-rank differences)",
        Published {
            repository: "lliai/D2MoE",
            commit: "b3092f030babf277218593b23cb5f98c66464154",
            licence: "Apache-2.0",
            driver: "run_d2_moe.py",
        },
    ),
    published(
        "svd-llm",
        "SVD-LLM (whitened SVD)",
        Published {
            repository: "AIoT-MLSys-Lab/SVD-LLM",
            commit: "1c1009a99bea54c22c27a4dd5d9fba7116dc456b",
            licence: "Apache-2.0",
            driver: "run_svd_llm.py",
        },
    ),
    published(
        "reap",
        "REAP (removes experts)",
        Published {
            repository: "CerebrasResearch/reap",
            commit: "1970473c51ca3caeb98c10392f15b3a08a672974",
            licence: "Apache-2.0",
            driver: "run_reap.py",
        },
    ),
    published(
        "hc-smoe",
        "HC-SMoE (merges experts)",
        Published {
            repository: "wazenmai/HC-SMoE",
            commit: "bd77eba1b55ca58606a47e2d0807a24218da73c3",
            licence: "MIT",
            driver: "run_hc_smoe.py",
        },
    ),
];

const fn ours(key: &'static str, name: &'static str, flags: &'static str) -> Program {
    Program { key, name, kind: Kind::Ours(flags) }
}

const fn published(key: &'static str, name: &'static str, published: Published) -> Program {
    Program { key, name, kind: Kind::Published(published) }
}
