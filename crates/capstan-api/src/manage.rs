//! The routes under `/capstan/v1`: what the command line asks of a node. All need the right to manage.
use axum::extract::{DefaultBodyLimit, Query, State};
use axum::response::Response;
use axum::routing::{get, post};
use axum::{Json, Router, middleware};
use capstan_proto::manage::{ClusterStatus, LoadEvent, LoadRequest, TicketReply};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::body::{self, JsonBody};
use crate::error::ApiError;
use crate::{App, guard, keys, pair};

/// Largest body of a management call in bytes: a load that names a range for each of a thousand layers.
const BODY_BYTES_MAX: usize = 256 << 10;

#[derive(Deserialize)]
struct Unload {
    name: String,
}

#[derive(Deserialize)]
struct NewTicket {
    ttl_s: u64,
    #[serde(default)]
    reusable: bool,
}

#[derive(Deserialize)]
struct Join {
    ticket: String,
}

#[derive(Deserialize)]
struct Named {
    name: String,
}

pub(crate) fn routes(app: &App) -> Router<App> {
    Router::new()
        .route("/status", get(status))
        .route("/load", post(load))
        .route("/unload", post(unload))
        .route("/ticket", post(ticket))
        .route("/join", post(join))
        .route("/leave", post(leave))
        .route("/nodes/remove", post(remove_node))
        .route("/nodes/drain", post(drain_node))
        .route("/stop", post(stop))
        .merge(keys::routes())
        .merge(pair::routes())
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .route_layer(middleware::from_fn_with_state(app.clone(), guard::check_manage))
}

async fn status(State(app): State<App>) -> Json<ClusterStatus> {
    Json(app.service.status().await)
}

/// Events as lines of JSON. A client that goes away stops nothing: the load goes on.
async fn load(State(app): State<App>, JsonBody(request): JsonBody<LoadRequest>) -> Result<Response, ApiError> {
    let events = app.service.load(request).await?;
    let is_last = |event: &LoadEvent| matches!(event, LoadEvent::Ready { .. } | LoadEvent::Failed { .. });
    Ok(body::lines(events, is_last, || LoadEvent::Failed {
        message: "the load broke off without a reason; see the node's log, then load again".into(),
    }))
}

async fn unload(State(app): State<App>, JsonBody(body): JsonBody<Unload>) -> Result<Json<Value>, ApiError> {
    app.service.unload(body.name.clone()).await?;
    Ok(Json(json!({"unloaded": body.name})))
}

async fn ticket(State(app): State<App>, JsonBody(body): JsonBody<NewTicket>) -> Result<Json<TicketReply>, ApiError> {
    Ok(Json(app.service.ticket(body.ttl_s, body.reusable).await?))
}

async fn join(State(app): State<App>, JsonBody(body): JsonBody<Join>) -> Result<Json<ClusterStatus>, ApiError> {
    Ok(Json(app.service.join(body.ticket).await?))
}

async fn leave(State(app): State<App>) -> Result<Json<Value>, ApiError> {
    app.service.leave().await?;
    Ok(Json(json!({"left": true})))
}

#[derive(serde::Deserialize)]
struct Stop {
    /// Cut answers in progress off.
    #[serde(default)]
    now: bool,
}

async fn stop(
    State(app): State<App>,
    how: Result<Query<Stop>, axum::extract::rejection::QueryRejection>,
) -> Result<Json<Value>, ApiError> {
    let Query(how) = how.map_err(|e| ApiError::bad("now", format!("the way to stop is not understood: {e}")))?;
    if how.now {
        app.service.stop_now().await;
    } else {
        app.service.stop().await;
    }
    Ok(Json(json!({"stopped": true})))
}

async fn remove_node(State(app): State<App>, JsonBody(body): JsonBody<Named>) -> Result<Json<ClusterStatus>, ApiError> {
    Ok(Json(app.service.remove_node(body.name).await?))
}

async fn drain_node(State(app): State<App>, JsonBody(body): JsonBody<Named>) -> Result<Json<ClusterStatus>, ApiError> {
    Ok(Json(app.service.drain_node(body.name).await?))
}
