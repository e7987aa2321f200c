//! Whole checkpoints on disk, honest and lying.

mod bundled_model;
mod draft;
/// Every layout gives the same canonical bytes.
mod layouts;
/// config.json, params.json and rank maps that lie.
mod lies_in_configs;
/// Headers that lie, and the format's own parser as a second opinion.
mod lies_in_headers;
/// Missing, surplus and contradicting shards and tensors.
mod lies_in_shards;
/// Symbolic links, special files, and files that change while they are open.
mod links;
