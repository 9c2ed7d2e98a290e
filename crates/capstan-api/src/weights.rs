//! The routes under `/capstan/v1` for models on disks: pull, list, verify, remove, export. All need the admin token.
use std::convert::Infallible;
use std::path::PathBuf;

use axum::body::Body;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router, middleware};
use bytes::Bytes;
use capstan_proto::weights::{ModelOutcome, ModelStatus, NodeDisk, PullEvent, PullRequest};
use futures::stream;
use serde::Deserialize;

use crate::body::JsonBody;
use crate::error::ApiError;
use crate::{App, guard};

/// Largest body in bytes: a pull that names a range for each of a thousand layers.
const BODY_BYTES_MAX: usize = 256 << 10;

#[derive(Deserialize)]
struct Named {
    name: String,
}

#[derive(Deserialize)]
struct Export {
    name: String,
    path: PathBuf,
}

pub(crate) fn routes(app: &App) -> Router<App> {
    Router::new()
        .route("/pull", post(pull))
        .route("/models", get(models))
        .route("/models/verify", post(verify))
        .route("/models/remove", post(remove))
        .route("/models/export", post(export))
        .route("/disk", get(disk))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .route_layer(middleware::from_fn_with_state(app.clone(), guard::check_manage))
}

/// Events as lines of JSON. A client that goes away stops nothing: the pull goes on.
async fn pull(State(app): State<App>, JsonBody(request): JsonBody<PullRequest>) -> Result<Response, ApiError> {
    let events = app.service.pull(request).await?;
    let lines = stream::unfold((events, false), |(mut events, ended)| async move {
        if ended {
            return None;
        }
        let event = events.recv().await.unwrap_or_else(|| PullEvent::Failed {
            message: "the pull broke off without a reason; see the node's log, then pull again: it goes on".into(),
        });
        let ended = matches!(event, PullEvent::Done { .. } | PullEvent::Failed { .. });
        let mut line = serde_json::to_vec(&event).unwrap_or_else(|e| {
            tracing::error!("an event of a pull could not be written as JSON: {e}");
            b"{}".to_vec()
        });
        line.push(b'\n');
        Some((Ok::<_, Infallible>(Bytes::from(line)), (events, ended)))
    });
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response())
}

async fn models(State(app): State<App>) -> Json<Vec<ModelStatus>> {
    Json(app.service.models().await)
}

async fn verify(State(app): State<App>, JsonBody(body): JsonBody<Named>) -> Result<Json<ModelOutcome>, ApiError> {
    Ok(Json(app.service.verify_model(body.name).await?))
}

async fn remove(State(app): State<App>, JsonBody(body): JsonBody<Named>) -> Result<Json<ModelOutcome>, ApiError> {
    Ok(Json(app.service.remove_model(body.name).await?))
}

async fn export(State(app): State<App>, JsonBody(body): JsonBody<Export>) -> Result<Json<ModelOutcome>, ApiError> {
    Ok(Json(app.service.export_model(body.name, body.path).await?))
}

async fn disk(State(app): State<App>) -> Json<Vec<NodeDisk>> {
    Json(app.service.disk().await)
}
