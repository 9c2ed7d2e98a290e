//! Every failure as OpenAI's error object, with the status that tells a client what to do.
use axum::Json;
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use capstan_proto::generate::{ErrorKind, RequestError};
use capstan_proto::manage::ManageError;
use serde_json::{Value, json};

/// Longest piece of a client's own text in a message, in characters.
const QUOTE_CHARS_MAX: usize = 200;
/// When to come back after a full queue, in seconds: about the time of a short answer.
const RETRY_BUSY_S: u32 = 1;
/// When to come back after a lost stage, in seconds: about the time to start it again.
const RETRY_LOST_S: u32 = 5;

/// A failed call: the status and the parts of `{"error": {...}}`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// HTTP status.
    pub status: StatusCode,
    /// What happened and what to do.
    pub message: String,
    /// The field of the request that is wrong, where one is.
    pub param: Option<String>,
    /// OpenAI's code, for programs.
    pub code: Option<&'static str>,
    /// Seconds after which another try makes sense.
    pub retry_after_s: Option<u32>,
}

impl ApiError {
    /// An error with this status and sentence.
    pub fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, code: None, retry_after_s: None }
    }

    /// A request that its sender must mend: 400, with the field that is wrong.
    pub fn bad(param: &str, message: impl Into<String>) -> Self {
        Self { param: Some(param.to_owned()), ..Self::new(StatusCode::BAD_REQUEST, message) }
    }

    /// The same error with a code.
    pub fn with_code(self, code: &'static str) -> Self {
        Self { code: Some(code), ..self }
    }

    /// 404 for a path that is no route.
    pub fn no_route(path: &str) -> Self {
        let path = quote(path);
        let message =
            format!("there is no {path}; the API has /v1/chat/completions, /v1/completions, /v1/models and /health");
        Self::new(StatusCode::NOT_FOUND, message).with_code("unknown_url")
    }

    /// 405 for a route that has another method.
    pub fn wrong_method(method: &Method, path: &str) -> Self {
        let message = format!("{} does not take {method}; use GET to read and POST to ask", quote(path));
        Self::new(StatusCode::METHOD_NOT_ALLOWED, message).with_code("method_not_allowed")
    }

    /// 404 for a model that is not loaded, with what is.
    pub fn no_model(name: &str, loaded: &[String]) -> Self {
        let message = format!("the model {:?} is not loaded; {}", quote(name), what_is_loaded(loaded));
        let error = Self::new(StatusCode::NOT_FOUND, message).with_code("model_not_found");
        Self { param: Some("model".into()), ..error }
    }

    /// The JSON body, also used as an event of a stream.
    pub fn body(&self) -> Value {
        let kind = match self.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            s if s.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        json!({"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}})
    }
}

/// What a client can ask for instead.
pub(crate) fn what_is_loaded(loaded: &[String]) -> String {
    if loaded.is_empty() {
        "no model is; load one with `capstan load MODEL.gguf`".to_owned()
    } else {
        format!("loaded are: {}", loaded.join(", "))
    }
}

/// A client's own text, cut to a length that fits a message.
pub(crate) fn quote(text: &str) -> String {
    text.chars().take(QUOTE_CHARS_MAX).collect()
}

impl From<RequestError> for ApiError {
    fn from(error: RequestError) -> Self {
        let (status, code, retry_after_s) = match error.kind {
            ErrorKind::BadRequest => (StatusCode::BAD_REQUEST, None, None),
            ErrorKind::ContextExceeded => (StatusCode::BAD_REQUEST, Some("context_length_exceeded"), None),
            ErrorKind::ModelNotFound => (StatusCode::NOT_FOUND, Some("model_not_found"), None),
            ErrorKind::Busy => (StatusCode::TOO_MANY_REQUESTS, Some("queue_full"), Some(RETRY_BUSY_S)),
            ErrorKind::StageLost => (StatusCode::SERVICE_UNAVAILABLE, Some("stage_lost"), Some(RETRY_LOST_S)),
            ErrorKind::Unavailable => (StatusCode::SERVICE_UNAVAILABLE, Some("unavailable"), Some(RETRY_LOST_S)),
            ErrorKind::Internal => (StatusCode::INTERNAL_SERVER_ERROR, Some("internal_error"), None),
        };
        Self { code, retry_after_s, ..Self::new(status, error.message) }
    }
}

impl From<ManageError> for ApiError {
    fn from(error: ManageError) -> Self {
        let status = StatusCode::from_u16(error.status).ok().filter(|s| s.is_client_error() || s.is_server_error());
        Self::new(status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR), error.message)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        if self.status.is_server_error() {
            tracing::warn!(status = self.status.as_u16(), "{}", self.message);
        }
        let mut response = (self.status, Json(self.body())).into_response();
        if let Some(seconds) = self.retry_after_s {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}
