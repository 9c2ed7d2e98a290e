//! HTTP on every node: OpenAI's API for whoever asks, and management for whoever has the admin token.
//!
//! | module | idea |
//! |---|---|
//! | [`error`] | every failure as OpenAI's error object with the right status |
//! | [`guard`] | who may talk to us: hosts, origins, the admin token |
//! | [`body`] | a bounded body becomes a typed value, or a sentence that says where it is wrong |
//! | [`request`] | OpenAI's requests, checked, become a `GenerateRequest` |
//! | [`answer`] | events become one JSON object or a stream of chunks |
//! | [`openai`] | the routes under `/v1`, and `/health` |
//! | [`manage`] | the routes under `/capstan/v1` |
//! | [`weights`] | those of them for models on disks |
#![forbid(unsafe_code)]

pub mod answer;
pub mod body;
pub mod error;
pub mod guard;
pub mod manage;
pub mod openai;
pub mod request;
pub mod weights;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::middleware;
use capstan_node::service::Service;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::error::ApiError;

/// How long answers in flight may go on once the server is told to stop.
pub const SHUTDOWN_GRACE: Duration = Duration::from_secs(5);

/// How the API behaves towards its clients.
#[derive(Clone, Debug)]
pub struct ApiOptions {
    /// What management calls must show as `Authorization: Bearer …`. Empty refuses them all.
    pub admin_token: String,
    /// Names and addresses that a `Host` header may hold besides the loopback ones. None takes every host, as is right
    /// for an API that is bound to a network's address on purpose.
    pub allowed_hosts: Option<Vec<String>>,
}

impl ApiOptions {
    /// The options for an API that listens on `bound`: on loopback, only loopback names are taken as hosts.
    pub fn new(admin_token: impl Into<String>, bound: IpAddr) -> Self {
        Self { admin_token: admin_token.into(), allowed_hosts: bound.is_loopback().then(Vec::new) }
    }
}

/// What the handlers share.
#[derive(Clone)]
pub(crate) struct App {
    pub service: Arc<dyn Service>,
    pub options: Arc<ApiOptions>,
}

/// All routes of a node.
pub fn router(service: Arc<dyn Service>, options: ApiOptions) -> Router {
    let app = App { service, options: Arc::new(options) };
    Router::new()
        .merge(openai::routes())
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
    listener: TcpListener,
    router: Router,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    let stopping = CancellationToken::new();
    let told = stopping.clone();
    let server = axum::serve(listener, router).with_graceful_shutdown(async move {
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
