//! The routes under `/capstan/v1/keys`: who may use the API from elsewhere.
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::routing::get;
use axum::{Json, Router};
use capstan_proto::keys::{KeyInfo, KeyScope, NewKey};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::App;
use crate::body::JsonBody;
use crate::error::ApiError;

#[derive(Deserialize)]
struct AddKey {
    name: String,
    #[serde(default)]
    manage: bool,
}

pub(crate) fn routes() -> Router<App> {
    Router::new().route("/keys", get(list).post(add)).route("/keys/{name}", axum::routing::delete(revoke))
}

async fn list(State(app): State<App>) -> Result<Json<Vec<KeyInfo>>, ApiError> {
    Ok(Json(app.service.keys().await?))
}

async fn add(State(app): State<App>, JsonBody(body): JsonBody<AddKey>) -> Result<Json<NewKey>, ApiError> {
    let scope = if body.manage { KeyScope::Manage } else { KeyScope::Use };
    Ok(Json(app.service.add_key(body.name, scope).await?))
}

async fn revoke(State(app): State<App>, name: Result<Path<String>, PathRejection>) -> Result<Json<Value>, ApiError> {
    let Path(name) =
        name.map_err(|_| ApiError::new(StatusCode::BAD_REQUEST, "the key's name in the path is no text"))?;
    let revoked = app.service.revoke_key(name.clone()).await?;
    Ok(Json(json!({"name": name, "revoked": revoked})))
}
