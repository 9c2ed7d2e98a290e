//! A bounded body becomes a typed value, or a sentence that says where it is wrong; events become lines of JSON.
use std::convert::Infallible;

use axum::body::Body;
use axum::extract::rejection::BytesRejection;
use axum::extract::{FromRequest, Request};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures::stream;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;

use crate::error::{ApiError, quote};

/// The JSON of a request's body. The `Content-Type` does not matter, so that plain `curl -d` works; web pages are kept
/// out by their `Origin`.
pub(crate) struct JsonBody<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for JsonBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let bytes = Bytes::from_request(request, state).await.map_err(unreadable)?;
        parse(&bytes).map(Self)
    }
}

/// The same body read twice: what all requests of a family share, and what is a request's own. Reading it twice keeps
/// the place of an error, which `serde(flatten)` loses.
pub(crate) struct JsonBodies<A, B>(pub A, pub B);

impl<A: DeserializeOwned, B: DeserializeOwned, S: Send + Sync> FromRequest<S> for JsonBodies<A, B> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let bytes = Bytes::from_request(request, state).await.map_err(unreadable)?;
        Ok(Self(parse(&bytes)?, parse(&bytes)?))
    }
}

/// Events as lines of JSON, up to the last one. A source that breaks off before that gets `broken_off` as its last. A
/// client that goes away stops nothing.
pub(crate) fn lines<T: Serialize + Send + 'static>(
    events: mpsc::Receiver<T>,
    is_last: fn(&T) -> bool,
    broken_off: fn() -> T,
) -> Response {
    let lines = stream::unfold((events, false), move |(mut events, ended)| async move {
        if ended {
            return None;
        }
        let event = events.recv().await.unwrap_or_else(broken_off);
        let mut line = serde_json::to_vec(&event).unwrap_or_else(|e| {
            tracing::error!("an event could not be written as JSON: {e}");
            b"{}".to_vec()
        });
        line.push(b'\n');
        Some((Ok::<_, Infallible>(Bytes::from(line)), (events, is_last(&event))))
    });
    ([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response()
}

fn unreadable(rejection: BytesRejection) -> ApiError {
    if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE {
        let message = "the body is larger than this call takes; shorten the prompt";
        return ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message).with_code("request_too_large");
    }
    ApiError::new(StatusCode::BAD_REQUEST, "the body could not be read to its end; send it again")
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    // Serde would also fill a struct from an array, field by field.
    match bytes.trim_ascii_start().first() {
        None => return Err(ApiError::new(StatusCode::BAD_REQUEST, "the body is empty; send a JSON object")),
        Some(b'{') => {}
        Some(_) => {
            let message = "the body is not a JSON object; it must begin with a brace";
            return Err(ApiError::new(StatusCode::BAD_REQUEST, message));
        }
    }
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        let inner = error.inner();
        if inner.is_data() && path != "." {
            let message = format!("{} is not as it should be: {}", quote(&path), quote(&inner.to_string()));
            return ApiError::bad(&quote(&path), message);
        }
        malformed(inner)
    })?;
    json.end().map_err(|error| malformed(&error))?;
    Ok(value)
}

fn malformed(error: &serde_json::Error) -> ApiError {
    let message = format!("the body is not the JSON object that this call takes: {}", quote(&error.to_string()));
    ApiError::new(StatusCode::BAD_REQUEST, message)
}
