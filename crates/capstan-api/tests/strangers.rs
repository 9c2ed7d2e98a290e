//! Every route, tried by whoever has no key, a wrong one, a revoked one, or one with too few rights.
mod fake;

use capstan_api::ApiOptions;
use capstan_api::door::Reach;
use capstan_node::service::Service;
use capstan_proto::keys::KeyScope;
use fake::{Server, TOKEN};
use reqwest::{Client, Method, Response};
use serde_json::{Value, json};

/// Every route with a method that it takes: what there is to be protected. A new route belongs here.
const USE: [(&str, &str); 5] = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/tiny"),
    ("GET", "/v1/models/org/slash"),
];
const MANAGE: [(&str, &str); 13] = [
    ("GET", "/capstan/v1/status"),
    ("POST", "/capstan/v1/load"),
    ("POST", "/capstan/v1/unload"),
    ("POST", "/capstan/v1/ticket"),
    ("POST", "/capstan/v1/join"),
    ("POST", "/capstan/v1/pair"),
    ("POST", "/capstan/v1/pair/join"),
    ("GET", "/capstan/v1/nearby"),
    ("GET", "/capstan/v1/keys"),
    ("POST", "/capstan/v1/keys"),
    ("DELETE", "/capstan/v1/keys/laptop"),
    ("POST", "/capstan/v1/leave"),
    ("POST", "/capstan/v1/stop"),
];

async fn call(server: &Server, (method, path): (&str, &str), shown: Option<&str>) -> Response {
    let method: Method = method.parse().unwrap();
    let mut request = Client::new().request(method, format!("{}{path}", server.base)).body("{}");
    if let Some(shown) = shown {
        request = request.header("authorization", shown);
    }
    request.send().await.unwrap()
}

async fn refused(response: Response, status: u16, code: &str) -> String {
    assert_eq!(response.status(), status);
    assert_eq!(response.headers().contains_key("www-authenticate"), status == 401);
    let body: Value = response.json().await.unwrap();
    assert_eq!(body["error"]["code"], code, "{body}");
    body["error"]["message"].as_str().unwrap().to_owned()
}

/// A server of the network's door, and a key of each kind: to use, to manage, and one that was revoked.
async fn network() -> (Server, [String; 3]) {
    let server = Server::open(Reach::Network, ApiOptions::new(TOKEN)).await;
    let add = async |name: &str, scope| server.fake.add_key(name.into(), scope).await.unwrap().key;
    let keys =
        [add("phone", KeyScope::Use).await, add("desk", KeyScope::Manage).await, add("lost", KeyScope::Manage).await];
    assert_eq!(server.fake.revoke_key("lost".into()).await.unwrap(), 1);
    (server, keys)
}

#[tokio::test]
async fn from_the_network_every_route_demands_a_key() {
    // A server for each pair, for many failures are answered otherwise.
    for route in USE.into_iter().chain(MANAGE) {
        let (server, [_, desk, lost]) = network().await;
        let message = refused(call(&server, route, None).await, 401, "missing_api_key").await;
        assert!(message.contains("capstan key add"), "{message}");
        let token = format!("Bearer {TOKEN}");
        for shown in ["Bearer", "Bearer ", "Basic sk-capstan-x", &desk] {
            refused(call(&server, route, Some(shown)).await, 401, "missing_api_key").await;
        }
        // The admin token is this machine's: by the network's door it is a wrong key like any other.
        for shown in ["Bearer sk-capstan-x", "Bearer x", &token, &format!("Bearer {lost}"), &format!("Bearer {desk}x")]
        {
            let message = refused(call(&server, route, Some(shown)).await, 401, "invalid_api_key").await;
            let secret = shown.strip_prefix("Bearer ").unwrap();
            assert!(secret.len() < 8 || !message.contains(secret), "{message}");
        }
        assert!(server.fake.requests.lock().unwrap().is_empty(), "nothing reached the node");
    }
}

#[tokio::test]
async fn a_key_opens_what_it_is_for() {
    let (server, [phone, desk, _]) = network().await;
    let (phone, desk) = (format!("Bearer {phone}"), format!("bearer {desk}"));
    for route in USE {
        for shown in [&phone, &desk] {
            // A body without a model is told that it has none: it got in.
            let status = call(&server, route, Some(shown)).await.status().as_u16();
            assert!(matches!(status, 200 | 400), "{route:?}: {status}");
        }
    }
    for route in MANAGE {
        let message = refused(call(&server, route, Some(&phone)).await, 403, "insufficient_permissions").await;
        assert!(message.contains("\"phone\"") && message.contains("--manage"), "{message}");
        let status = call(&server, route, Some(&desk)).await.status().as_u16();
        assert!(!matches!(status, 401 | 403 | 429), "{route:?}: {status}");
    }
    let body = json!({"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]});
    let chat = Client::new().post(format!("{}/v1/chat/completions", server.base)).header("authorization", phone);
    assert_eq!(chat.json(&body).send().await.unwrap().status(), 200);
}

#[tokio::test]
async fn health_is_open_and_tells_strangers_nothing() {
    let (server, _) = network().await;
    let health: Value = call(&server, ("GET", "/health"), None).await.json().await.unwrap();
    assert_eq!(health, json!({"status": "ok"}));
    assert_eq!(call(&server, ("GET", "/nowhere"), None).await.status(), 404);
}

#[tokio::test]
async fn whoever_fails_often_has_to_wait_but_a_right_key_passes() {
    let (server, [phone, ..]) = network().await;
    let mut statuses = vec![];
    for _ in 0..40 {
        statuses.push(call(&server, USE[2], Some("Bearer sk-capstan-guess")).await.status().as_u16());
    }
    let first = statuses.iter().position(|s| *s == 429).expect("guessing is slowed down");
    assert!(first >= 5 && statuses[..first].iter().all(|s| *s == 401), "{statuses:?}");
    let limited = call(&server, USE[2], None).await;
    assert!(limited.headers().contains_key("retry-after"));
    refused(limited, 429, "too_many_attempts").await;
    assert_eq!(call(&server, USE[2], Some(&format!("Bearer {phone}"))).await.status(), 200);
}

#[tokio::test]
async fn no_auth_opens_the_models_and_nothing_else() {
    let mut options = ApiOptions::new(TOKEN);
    options.no_auth = true;
    let server = Server::open(Reach::Network, options).await;
    assert_eq!(call(&server, ("GET", "/v1/models"), None).await.status(), 200);
    let key = server.fake.add_key("desk".into(), KeyScope::Manage).await.unwrap().key;
    for route in MANAGE {
        refused(call(&server, route, None).await, 401, "missing_api_key").await;
    }
    let status = call(&server, MANAGE[0], Some(&format!("Bearer {key}"))).await;
    assert_eq!(status.status(), 200);
    // A page whose name was pointed at this machine is not answered: it needs no key to do harm.
    let rebound = Client::new().get(format!("{}/v1/models", server.base)).header("host", "evil.example");
    assert_eq!(rebound.send().await.unwrap().status(), 403);
}

#[tokio::test]
async fn by_this_machines_door_models_are_open_and_management_takes_token_or_key() {
    let server = Server::start().await;
    let key =
        async |name: &str, scope| format!("Bearer {}", server.fake.add_key(name.into(), scope).await.unwrap().key);
    let (phone, desk) = (key("phone", KeyScope::Use).await, key("desk", KeyScope::Manage).await);
    assert_eq!(call(&server, ("GET", "/v1/models"), None).await.status(), 200);
    let token = format!("Bearer {TOKEN}");
    for route in MANAGE {
        refused(call(&server, route, None).await, 401, "missing_api_key").await;
        refused(call(&server, route, Some("Bearer wrong")).await, 401, "invalid_api_key").await;
        refused(call(&server, route, Some(&phone)).await, 403, "insufficient_permissions").await;
        for shown in [&token, &desk] {
            assert!(!matches!(call(&server, route, Some(shown)).await.status().as_u16(), 401 | 403), "{route:?}");
        }
    }
}

#[tokio::test]
async fn a_strangers_garbage_and_megabytes_end_nothing() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let (mut server, [phone, ..]) = network().await;
    let addr = server.base.strip_prefix("http://").unwrap();
    let endless = [b"GET /v1/models HTTP/1.1\r\nx: ".as_slice(), &[b'a'; 1 << 20]].concat();
    for bytes in
        [&b"\x16\x03\x01\x02\x00\x01\x00"[..], b"\0\0\0\0\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nxx\r\n\r\n", &endless]
    {
        let mut stream = tokio::net::TcpStream::connect(addr).await.unwrap();
        // It may be closed in the middle of that already.
        stream.write_all(bytes).await.ok();
        stream.shutdown().await.ok();
        let mut answer = vec![];
        stream.read_to_end(&mut answer).await.ok();
        assert!(!answer.starts_with(b"HTTP/1.1 200"), "{:?}", String::from_utf8_lossy(&answer));
    }
    // The body of a stranger's call is not read: it would be megabytes for everybody who asks.
    let large = Client::new().post(format!("{}/v1/completions", server.base)).body(vec![b' '; 4 << 20]).send().await;
    assert!(large.is_err() || large.is_ok_and(|r| r.status() == 401));
    assert_eq!(call(&server, USE[2], Some(&format!("Bearer {phone}"))).await.status(), 200);
    // And it ends in order when it is told to.
    server.stop.take().unwrap().send(()).unwrap();
    server.task.take().unwrap().await.unwrap().unwrap();
}
