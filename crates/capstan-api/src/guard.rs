//! Who may talk to us: hosts, origins, the admin token.
//!
//! A web page in the user's browser can reach a loopback port. It must neither read answers by pointing a name of its
//! own at 127.0.0.1 (the `Host` header gives it away) nor send requests blindly (the `Origin` header gives it away).
use std::net::IpAddr;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use crate::error::{ApiError, quote};
use crate::{ApiOptions, App};

/// Refuses requests for foreign hosts and from foreign origins.
pub(crate) async fn check_host(State(app): State<App>, request: Request, next: Next) -> Response {
    let authority = match request.uri().authority() {
        Some(authority) => Some(authority.as_str().to_owned()),
        None => text(request.headers(), header::HOST).map(str::to_owned),
    };
    if let Err(error) = check(&app.options, authority.as_deref(), text(request.headers(), header::ORIGIN)) {
        return error.into_response();
    }
    next.run(request).await
}

fn text(headers: &HeaderMap, name: header::HeaderName) -> Option<&str> {
    // A value that is no text is as good as a foreign name.
    headers.get(name).map(|v| v.to_str().unwrap_or("?"))
}

fn check(options: &ApiOptions, authority: Option<&str>, origin: Option<&str>) -> Result<(), ApiError> {
    let forbidden = |message| Err(ApiError::new(StatusCode::FORBIDDEN, message));
    if let Some(allowed) = &options.allowed_hosts {
        let Some(authority) = authority else {
            return Err(ApiError::new(StatusCode::BAD_REQUEST, "the request has no Host header; send one"));
        };
        let host = host_of(authority);
        if !is_loopback(host) && !allowed.iter().any(|a| a.eq_ignore_ascii_case(host)) {
            return forbidden(format!(
                "this API is for this machine and does not answer to the host {:?}; use 127.0.0.1 or localhost",
                quote(host)
            ));
        }
    }
    let Some(origin) = origin else { return Ok(()) };
    let from = origin.split_once("://").map_or(origin, |(_, rest)| rest);
    let allowed = options.allowed_hosts.iter().flatten().any(|a| a.eq_ignore_ascii_case(host_of(from)));
    if allowed || authority.is_some_and(|a| a.eq_ignore_ascii_case(from)) {
        Ok(())
    } else {
        forbidden(format!(
            "a web page of {:?} may not use this API; only pages that this node serves may",
            quote(origin)
        ))
    }
}

/// The host of `host:port`, `[v6]:port` or `host`.
fn host_of(authority: &str) -> &str {
    if let Some((host, _)) = authority.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        return host;
    }
    authority.rsplit_once(':').map_or(authority, |(host, _)| host)
}

fn is_loopback(host: &str) -> bool {
    host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok_and(|ip| ip.to_canonical().is_loopback())
}

/// Refuses management calls without the admin token.
pub(crate) async fn check_token(State(app): State<App>, request: Request, next: Next) -> Response {
    let shown = text(request.headers(), header::AUTHORIZATION).and_then(|v| v.split_once(' '));
    let shown = shown.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer")).map(|(_, token)| token.trim());
    let wanted = app.options.admin_token.as_bytes();
    // Hashes compare in constant time, whatever the lengths.
    let right = shown.is_some_and(|token| !wanted.is_empty() && blake3::hash(token.as_bytes()) == blake3::hash(wanted));
    if right {
        return next.run(request).await;
    }
    let message = "this call needs the admin token of the node as `Authorization: Bearer …`; it stands in daemon.json \
                   in the node's data folder, and the capstan command reads it there";
    ApiError::new(StatusCode::UNAUTHORIZED, message).with_code("invalid_api_key").into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_and_origins() {
        let local = ApiOptions { admin_token: String::new(), allowed_hosts: Some(vec!["box.lan".into()]) };
        let open = ApiOptions { admin_token: String::new(), allowed_hosts: None };
        for host in
            ["127.0.0.1:80", "localhost", "LOCALHOST:1", "[::1]:9", "127.9.9.9", "[::ffff:127.0.0.1]:1", "Box.lan:3"]
        {
            assert!(check(&local, Some(host), None).is_ok(), "{host}");
        }
        for host in ["evil.example:80", "localhost.evil.example", "10.0.0.1", "", "127.0.0.1.nip.io", "[::2]:9", "?"] {
            assert!(check(&local, Some(host), None).is_err(), "{host}");
            assert!(check(&open, Some(host), None).is_ok(), "{host}");
        }
        assert!(check(&local, None, None).is_err());
        assert!(check(&local, Some("127.0.0.1:8"), Some("http://127.0.0.1:8")).is_ok());
        assert!(check(&local, Some("127.0.0.1:8"), Some("https://box.lan")).is_ok());
        for origin in ["https://evil.example", "null", "http://127.0.0.1:9", "file://"] {
            assert!(check(&local, Some("127.0.0.1:8"), Some(origin)).is_err(), "{origin}");
            assert!(check(&open, Some("10.0.0.1:8"), Some(origin)).is_err(), "{origin}");
        }
    }
}
