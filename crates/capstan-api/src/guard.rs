//! Who may talk to us: hosts, origins, keys.
//!
//! | call | by this machine's door | by the network's door |
//! |---|---|---|
//! | `/health` | open | open, and says no more than that it is up |
//! | `/v1/…` | open | a key, unless `--no-auth` |
//! | `/capstan/v1/…` | the daemon's token, or a key with the scope `manage` | a key with the scope `manage`, always |
//!
//! A web page in the user's browser can reach a loopback port. It must neither read answers by pointing a name of its
//! own at 127.0.0.1 (the `Host` header gives it away) nor send requests blindly (the `Origin` header gives it away).
use std::net::IpAddr;
use std::sync::PoisonError;
use std::time::Instant;

use axum::extract::{ConnectInfo, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use capstan_proto::keys::KeyScope;

use crate::door::Door;
use crate::error::{ApiError, quote};
use crate::{ApiOptions, App};

/// Refuses requests for foreign hosts and from foreign origins.
pub(crate) async fn check_host(State(app): State<App>, request: Request, next: Next) -> Response {
    let authority = match request.uri().authority() {
        Some(authority) => Some(authority.as_str().to_owned()),
        None => text(request.headers(), header::HOST).map(str::to_owned),
    };
    let hosts = match door(&request) {
        Some(door) if door.local => Hosts::Loopback,
        _ if app.options.no_auth => Hosts::Unspoofable,
        // Whoever shows a key is no page that only happens to run in the user's browser.
        _ => Hosts::Any,
    };
    if let Err(error) = check(&app.options, hosts, authority.as_deref(), text(request.headers(), header::ORIGIN)) {
        return error.into_response();
    }
    next.run(request).await
}

fn door(request: &Request) -> Option<Door> {
    request.extensions().get::<ConnectInfo<Door>>().map(|ConnectInfo(door)| *door)
}

fn text(headers: &HeaderMap, name: header::HeaderName) -> Option<&str> {
    // A value that is no text is as good as a foreign name.
    headers.get(name).map(|v| v.to_str().unwrap_or("?"))
}

/// Which names a `Host` header may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hosts {
    /// Those of this machine for itself.
    Loopback,
    /// Those that no stranger's name server can point here: addresses, and names of the local network.
    Unspoofable,
    /// All.
    Any,
}

impl Hosts {
    fn allows(self, host: &str) -> bool {
        match self {
            Self::Loopback => is_loopback(host),
            Self::Unspoofable => {
                let host = host.trim_end_matches('.').to_ascii_lowercase();
                // RFC 6762 (.local), RFC 8375 (.home.arpa), and ICANN's .internal are never delegated to anybody.
                let local = ["local", "home.arpa", "internal"]
                    .iter()
                    .any(|zone| host.strip_suffix(zone).is_some_and(|rest| rest.ends_with('.')));
                host.parse::<IpAddr>().is_ok() || local || (!host.is_empty() && !host.contains('.'))
            }
            Self::Any => true,
        }
    }
}

fn check(options: &ApiOptions, hosts: Hosts, authority: Option<&str>, origin: Option<&str>) -> Result<(), ApiError> {
    let forbidden = |message| Err(ApiError::new(StatusCode::FORBIDDEN, message));
    let also = |host: &str| options.allowed_hosts.iter().any(|a| a.eq_ignore_ascii_case(host));
    if hosts != Hosts::Any {
        let Some(authority) = authority else {
            return Err(ApiError::new(StatusCode::BAD_REQUEST, "the request has no Host header; send one"));
        };
        let host = host_of(authority);
        if !hosts.allows(host) && !also(host) {
            let why = match hosts {
                Hosts::Loopback => "this API is for this machine",
                _ => "this API asks for no key (--no-auth)",
            };
            let instead = match hosts {
                Hosts::Loopback => "127.0.0.1 or localhost",
                _ => "the machine's address",
            };
            return forbidden(format!("{why} and does not answer to the host {:?}; use {instead}", quote(host)));
        }
    }
    let Some(origin) = origin else { return Ok(()) };
    let from = origin.split_once("://").map_or(origin, |(_, rest)| rest);
    if also(host_of(from)) || authority.is_some_and(|a| a.eq_ignore_ascii_case(from)) {
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

/// Refuses calls that use models, unless they may.
pub(crate) async fn check_use(State(app): State<App>, request: Request, next: Next) -> Response {
    admit(app, KeyScope::Use, request, next).await
}

/// Refuses calls that manage, unless they may.
pub(crate) async fn check_manage(State(app): State<App>, request: Request, next: Next) -> Response {
    admit(app, KeyScope::Manage, request, next).await
}

async fn admit(app: App, needed: KeyScope, request: Request, next: Next) -> Response {
    let shown = bearer(request.headers()).map(str::to_owned);
    match judge(&app, door(&request), needed, shown.as_deref()) {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    }
}

/// Whether whoever shows no key may be told more than that the daemon is up.
pub(crate) fn may_know(app: &App, door: Option<Door>) -> bool {
    app.options.no_auth || door.is_some_and(|d| d.local)
}

/// What a call shows as `Authorization: Bearer …`.
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, shown) = text(headers, header::AUTHORIZATION)?.split_once(' ')?;
    Some(shown.trim()).filter(|shown| scheme.eq_ignore_ascii_case("bearer") && !shown.is_empty())
}

fn judge(app: &App, door: Option<Door>, needed: KeyScope, shown: Option<&str>) -> Result<(), ApiError> {
    // A connection of which nothing is known is from outside.
    let local = door.is_some_and(|d| d.local);
    if needed == KeyScope::Use && (local || app.options.no_auth) {
        return Ok(());
    }
    if local && shown.is_some_and(|shown| app.options.is_admin_token(shown)) {
        return Ok(());
    }
    let (refused, code) = match shown.map(|shown| app.service.check_key(shown)) {
        Some(Some((_, scope))) if scope.covers(needed) => return Ok(()),
        Some(Some((name, _))) => {
            let message = format!(
                "the API key {:?} may use models but not manage the cluster; make one that may with `capstan key add \
                 NAME --manage` on a node",
                quote(&name)
            );
            return Err(ApiError::new(StatusCode::FORBIDDEN, message).with_code("insufficient_permissions"));
        }
        // What was shown is not repeated: it may be right elsewhere.
        Some(None) => {
            ("this API key is not good here: it is mistyped, was revoked, or is another cluster's", "invalid_api_key")
        }
        None => ("this call shows no API key", "missing_api_key"),
    };
    if let Some(door) = door.filter(|d| !d.local) {
        let mut attempts = app.attempts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(seconds) = attempts.failed(door.party(), Instant::now()) {
            let message = format!("too many calls without a right API key came from here; try again in {seconds} s");
            let error = ApiError::new(StatusCode::TOO_MANY_REQUESTS, message).with_code("too_many_attempts");
            return Err(ApiError { retry_after_s: Some(seconds), ..error });
        }
        tracing::info!(peer = %door.party(), code, "a call without a right key was refused");
    }
    let what_to_do = if local {
        "; it needs the admin token of the node as `Authorization: Bearer …`, which stands in daemon.json in the node's \
         data folder, where the capstan command reads it, or an API key made with `capstan key add NAME --manage`"
    } else if needed == KeyScope::Manage {
        "; send one as `Authorization: Bearer sk-capstan-…`, made on a node with `capstan key add NAME --manage`"
    } else {
        "; send one as `Authorization: Bearer sk-capstan-…` (in OpenAI clients: api_key), made on a node with \
         `capstan key add NAME`"
    };
    Err(ApiError::new(StatusCode::UNAUTHORIZED, format!("{refused}{what_to_do}")).with_code(code))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_and_origins() {
        let mut options = ApiOptions::new("");
        options.allowed_hosts = vec!["box.lan".into()];
        let local = |host, origin| check(&options, Hosts::Loopback, host, origin);
        let open = |host, origin| check(&options, Hosts::Any, host, origin);
        for host in
            ["127.0.0.1:80", "localhost", "LOCALHOST:1", "[::1]:9", "127.9.9.9", "[::ffff:127.0.0.1]:1", "Box.lan:3"]
        {
            assert!(local(Some(host), None).is_ok(), "{host}");
        }
        for host in ["evil.example:80", "localhost.evil.example", "10.0.0.1", "", "127.0.0.1.nip.io", "[::2]:9", "?"] {
            assert!(local(Some(host), None).is_err(), "{host}");
            assert!(open(Some(host), None).is_ok(), "{host}");
        }
        assert!(local(None, None).is_err());
        assert!(local(Some("127.0.0.1:8"), Some("http://127.0.0.1:8")).is_ok());
        assert!(local(Some("127.0.0.1:8"), Some("https://box.lan")).is_ok());
        for origin in ["https://evil.example", "null", "http://127.0.0.1:9", "file://"] {
            assert!(local(Some("127.0.0.1:8"), Some(origin)).is_err(), "{origin}");
            assert!(open(Some("10.0.0.1:8"), Some(origin)).is_err(), "{origin}");
        }
    }

    #[test]
    fn without_keys_only_names_that_nobody_can_point_here() {
        let options = ApiOptions::new("");
        for host in ["10.0.0.1:8420", "[fd00::1]:1", "alpha", "alpha.local:8420", "alpha.home.arpa.", "a.internal"] {
            assert!(check(&options, Hosts::Unspoofable, Some(host), None).is_ok(), "{host}");
        }
        for host in ["evil.example", "10.0.0.1.nip.io", "local.evil.example", "", "evillocal.example:80", "a.lan.com"] {
            assert!(check(&options, Hosts::Unspoofable, Some(host), None).is_err(), "{host}");
        }
    }

    #[test]
    fn what_counts_as_shown() {
        let headers = |value: &'static str| {
            HeaderMap::from_iter([(header::AUTHORIZATION, header::HeaderValue::from_static(value))])
        };
        assert_eq!(bearer(&headers("bearer  sk-capstan-x ")), Some("sk-capstan-x"));
        for none in ["Bearer", "Bearer ", "Basic x", "sk-capstan-x", ""] {
            assert_eq!(bearer(&headers(none)), None, "{none}");
        }
        assert_eq!(bearer(&HeaderMap::new()), None);
    }
}
