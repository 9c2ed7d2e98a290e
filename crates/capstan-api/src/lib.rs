//! HTTP on every node: OpenAI's API and management, for this machine and, with keys, for others.
//!
//! | module | idea |
//! |---|---|
//! | [`error`] | every failure as OpenAI's error object with the right status |
//! | [`door`] | by which door a connection came in: this machine's own, or the network's |
//! | [`guard`] | who may talk to us: hosts, origins, keys |
//! | `attempts` | how often somebody failed to show a key |
//! | [`body`] | a bounded body becomes a typed value, or a sentence that says where it is wrong |
//! | [`request`] | OpenAI's requests, checked, become a `GenerateRequest` |
//! | [`answer`] | events become one JSON object or a stream of chunks |
//! | [`openai`] | the routes under `/v1`, and `/health` |
//! | [`manage`], `keys`, `pair` | the routes under `/capstan/v1` |
//! | [`weights`] | those of them for models on disks |
#![forbid(unsafe_code)]

pub mod answer;
mod attempts;
pub mod body;
pub mod door;
pub mod error;
pub mod guard;
mod keys;
pub mod manage;
pub mod openai;
mod pair;
pub mod request;
pub mod weights;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::middleware;
use capstan_node::service::Service;
use tokio_util::sync::CancellationToken;

use crate::attempts::Attempts;
use crate::door::{Door, DoorListener};
use crate::error::ApiError;

/// How long answers in flight may go on once the server is told to stop.
pub const SHUTDOWN_GRACE: Duration = Duration::from_secs(5);

/// How the API behaves towards its clients.
#[derive(Clone)]
pub struct ApiOptions {
    /// BLAKE3 of what management calls by this machine's door may show instead of a key; none refuses all that do.
    admin_token: Option<blake3::Hash>,
    /// Whether the network's door lets everybody use the models.
    pub no_auth: bool,
    /// Names and addresses that a `Host` or `Origin` header may hold besides those that it may hold anyway.
    pub allowed_hosts: Vec<String>,
}

impl ApiOptions {
    /// The strictest options, with this admin token; an empty one is none.
    pub fn new(admin_token: impl AsRef<str>) -> Self {
        let token = admin_token.as_ref();
        let admin_token = (!token.is_empty()).then(|| blake3::hash(token.as_bytes()));
        Self { admin_token, no_auth: false, allowed_hosts: vec![] }
    }

    fn is_admin_token(&self, shown: &str) -> bool {
        // Hashes compare in constant time, whatever the lengths.
        self.admin_token.is_some_and(|token| token == blake3::hash(shown.as_bytes()))
    }
}

// Without anything of the token.
impl std::fmt::Debug for ApiOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ApiOptions")
            .field("no_auth", &self.no_auth)
            .field("allowed_hosts", &self.allowed_hosts)
            .finish_non_exhaustive()
    }
}

/// What the handlers share.
#[derive(Clone)]
pub(crate) struct App {
    pub service: Arc<dyn Service>,
    pub options: Arc<ApiOptions>,
    /// Failures to show a key.
    pub attempts: Arc<Mutex<Attempts>>,
}

/// All routes of a node.
pub fn router(service: Arc<dyn Service>, options: ApiOptions) -> Router {
    let app = App { service, options: Arc::new(options), attempts: Arc::default() };
    Router::new()
        .merge(openai::routes(&app))
        .nest("/capstan/v1", manage::routes(&app).merge(weights::routes(&app)))
        .fallback(|uri: axum::http::Uri| async move { ApiError::no_route(uri.path()) })
        .method_not_allowed_fallback(|method: axum::http::Method, uri: axum::http::Uri| async move {
            ApiError::wrong_method(&method, uri.path())
        })
        .layer(middleware::from_fn_with_state(app.clone(), guard::check_host))
        .with_state(app)
}

/// Serves until `shutdown` resolves, and then at most [`SHUTDOWN_GRACE`] longer for what is in flight.
pub async fn serve(
    listener: DoorListener,
    router: Router,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    let stopping = CancellationToken::new();
    let told = stopping.clone();
    let service = router.into_make_service_with_connect_info::<Door>();
    let server = axum::serve(listener, service).with_graceful_shutdown(async move {
        shutdown.await;
        told.cancel();
    });
    let cut_off = async {
        stopping.cancelled().await;
        tokio::time::sleep(SHUTDOWN_GRACE).await;
    };
    tokio::select! {
        ended = server => ended,
        () = cut_off => {
            tracing::info!("connections were still open when the grace period ended; they are closed");
            Ok(())
        }
    }
}
