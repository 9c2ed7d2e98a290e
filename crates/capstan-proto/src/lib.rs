//! Every message that crosses a process or a machine border, its codec, its limits and its version.
//!
//! Pure: no sockets, no clock, no tokio. A map:
//!
//! | module | idea |
//! |---|---|
//! | [`ids`] | names of nodes, clusters, requests, epochs |
//! | [`layers`] | a layer range that cannot be empty |
//! | [`limits`] | every bound, with its reason |
//! | [`codec`] | length-prefixed postcard frames, checked before allocation |
//! | [`data`] | micro-batches between stages |
//! | [`child`] | the daemon and its compute child |
//! | [`control`] | one node's daemon and another's |
//! | [`version`] | which protocols a build speaks, and the rules for changing them |
//! | [`keys`] | API keys as they travel |
//! | [`pairing`] | a short code instead of a ticket |
//! | [`device`] | what a machine was measured to take |
//! | [`generate`] | a request for tokens and the events it brings |
//! | [`manage`] | load, status, tickets: what the command line and the daemon exchange |
//! | [`weights`] | models that were pulled: what they are made of, who has which parts, and how parts move |
#![forbid(unsafe_code)]

pub mod child;
pub mod codec;
pub mod control;
pub mod data;
pub mod device;
pub mod generate;
pub mod ids;
pub mod keys;
pub mod layers;
pub mod limits;
pub mod manage;
pub mod pairing;
pub mod version;
pub mod weights;

pub use ids::{ClusterId, ContentHash, DeploymentId, Epoch, KeyHash, ModelId, NodeId, RequestId};
pub use layers::LayerRange;
