//! The routes under `/v1` as OpenAI has them, and `/health`.
use axum::extract::{ConnectInfo, DefaultBodyLimit, Path, State};
use axum::http::StatusCode;
use axum::response::Response;
use axum::routing::{get, post};
use axum::{Extension, Json, Router, middleware};
use capstan_proto::generate::GenerateRequest;
use capstan_proto::limits::PROMPT_BYTES_MAX;
use capstan_proto::manage::DeploymentStatus;
use serde_json::{Value, json};

use crate::answer::{Answer, Kind, streamed, whole};
use crate::body::JsonBodies;
use crate::door::Door;
use crate::error::{ApiError, what_is_loaded};
use crate::request::{ChatRequest, Common, CompletionRequest};
use crate::{App, guard};

pub(crate) fn routes(app: &App) -> Router<App> {
    Router::new()
        .route("/v1/chat/completions", post(chat))
        .route("/v1/completions", post(completion))
        .route("/v1/models", get(models))
        // Names of models may hold slashes.
        .route("/v1/models/{*id}", get(model))
        .route_layer(middleware::from_fn_with_state(app.clone(), guard::check_use))
        // After the layer, and so open to all.
        .route("/health", get(health))
        .layer(DefaultBodyLimit::max(PROMPT_BYTES_MAX))
}

async fn chat(
    State(app): State<App>,
    JsonBodies(common, own): JsonBodies<Common, ChatRequest>,
) -> Result<Response, ApiError> {
    let model = app.loaded(common.model.as_deref()).await?;
    app.answer(Kind::Chat, own.generate(&common, &model)?, common.streaming()).await
}

async fn completion(
    State(app): State<App>,
    JsonBodies(common, own): JsonBodies<Common, CompletionRequest>,
) -> Result<Response, ApiError> {
    let model = app.loaded(common.model.as_deref()).await?;
    app.answer(Kind::Completion, own.generate(&common, &model)?, common.streaming()).await
}

impl App {
    /// The model that a request names, if it is loaded.
    async fn loaded(&self, model: Option<&str>) -> Result<String, ApiError> {
        let names: Vec<String> = self.service.status().await.deployments.into_iter().map(|d| d.name).collect();
        match model.filter(|m| !m.is_empty()) {
            None => {
                let message = format!("the request names no model; {}", what_is_loaded(&names));
                Err(ApiError::bad("model", message).with_code("missing_required_parameter"))
            }
            Some(name) if names.iter().any(|n| n == name) => Ok(name.to_owned()),
            Some(name) => Err(ApiError::no_model(name, &names)),
        }
    }

    async fn answer(
        &self,
        kind: Kind,
        request: GenerateRequest,
        (stream, with_usage): (bool, bool),
    ) -> Result<Response, ApiError> {
        let answer = Answer::new(kind, &request.model, request.logprobs.is_some());
        let events = self.service.generate(request).await?;
        if stream { streamed(answer, events, with_usage).await } else { whole(answer, events).await }
    }
}

fn model_json(deployment: &DeploymentStatus) -> Value {
    json!({
        "id": deployment.name,
        "object": "model",
        "created": deployment.created_unix_s,
        "owned_by": "capstan",
        "context_length": deployment.ctx,
        "health": deployment.health,
    })
}

async fn models(State(app): State<App>) -> Json<Value> {
    let status = app.service.status().await;
    Json(json!({"object": "list", "data": status.deployments.iter().map(model_json).collect::<Vec<_>>()}))
}

async fn model(
    State(app): State<App>,
    path: Result<Path<String>, axum::extract::rejection::PathRejection>,
) -> Result<Json<Value>, ApiError> {
    let Path(id) = path.map_err(|e| {
        ApiError::new(StatusCode::BAD_REQUEST, format!("the model's name in the path is not text: {e}"))
    })?;
    let deployments = app.service.status().await.deployments;
    match deployments.iter().find(|d| d.name == id) {
        Some(deployment) => Ok(Json(model_json(deployment))),
        None => Err(ApiError::no_model(&id, &deployments.into_iter().map(|d| d.name).collect::<Vec<_>>())),
    }
}

async fn health(State(app): State<App>, door: Option<Extension<ConnectInfo<Door>>>) -> Json<Value> {
    let door = door.map(|Extension(ConnectInfo(door))| door);
    if !guard::may_know(&app, door) {
        return Json(json!({"status": "ok"}));
    }
    let status = app.service.status().await;
    Json(json!({
        "status": "ok",
        "version": status.version,
        "nodes": status.nodes.len(),
        "nodes_online": status.nodes.iter().filter(|n| n.online).count(),
        "models": status.deployments.len(),
    }))
}
