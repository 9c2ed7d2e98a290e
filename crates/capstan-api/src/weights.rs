//! The routes under `/capstan/v1` for models on disks: pull, list, verify, remove, export. All need the admin token.
use std::path::PathBuf;

use axum::extract::{DefaultBodyLimit, State};
use axum::response::Response;
use axum::routing::{get, post};
use axum::{Json, Router, middleware};
use capstan_proto::weights::{ModelOutcome, ModelStatus, NodeDisk, PullEvent, PullRequest};
use serde::Deserialize;

use crate::body::{self, JsonBody};
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
    let is_last = |event: &PullEvent| matches!(event, PullEvent::Done { .. } | PullEvent::Failed { .. });
    Ok(body::lines(events, is_last, || PullEvent::Failed {
        message: "the pull broke off without a reason; see the node's log, then pull again: it goes on".into(),
    }))
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
