//! Whole checkpoints on disk, honest and lying.

mod bundled_model;
mod draft;
mod layouts;
mod lies_in_configs;
mod lies_in_headers;
mod lies_in_shards;
mod links;
mod what_people_bring;
