//! The routes by which machines find together without a ticket.
use std::net::SocketAddr;

use axum::extract::State;
use axum::routing::{get, post};
use axum::{Json, Router};
use capstan_proto::manage::ClusterStatus;
use capstan_proto::pairing::{NearbyNode, PairingReply};
use serde::Deserialize;

use crate::App;
use crate::body::JsonBody;
use crate::error::ApiError;

#[derive(Deserialize)]
struct OpenPairing {
    ttl_s: u64,
}

#[derive(Deserialize)]
struct JoinByCode {
    code: String,
    #[serde(default)]
    at: Option<SocketAddr>,
}

pub(crate) fn routes() -> Router<App> {
    Router::new().route("/pair", post(open)).route("/pair/join", post(join)).route("/nearby", get(nearby))
}

async fn open(State(app): State<App>, JsonBody(body): JsonBody<OpenPairing>) -> Result<Json<PairingReply>, ApiError> {
    Ok(Json(app.service.open_pairing(body.ttl_s).await?))
}

async fn join(State(app): State<App>, JsonBody(body): JsonBody<JoinByCode>) -> Result<Json<ClusterStatus>, ApiError> {
    Ok(Json(app.service.pair(body.code, body.at).await?))
}

async fn nearby(State(app): State<App>) -> Result<Json<Vec<NearbyNode>>, ApiError> {
    Ok(Json(app.service.nearby().await?))
}
