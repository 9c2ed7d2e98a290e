//! The calls for models on disks, asked of a scripted node over HTTP.
// Some of it is for the other tests.
#[allow(dead_code)]
mod fake;

use fake::{Server, TOKEN};
use reqwest::{Client, RequestBuilder, Response};
use serde_json::{Value, json};

async fn value(response: Response) -> (u16, Value) {
    (response.status().as_u16(), response.json().await.unwrap())
}

#[tokio::test]
async fn a_pull_is_told_line_by_line_and_everything_needs_the_token() {
    let server = Server::start().await;
    let client = Client::new();
    let url = |path: &str| format!("{}/capstan/v1/{path}", server.base);
    let gets = ["models", "disk"].map(|p| client.get(url(p)));
    let posts = ["pull", "models/verify", "models/remove", "models/export"].map(|p| client.post(url(p)).body("{}"));
    for call in gets.into_iter().chain(posts) {
        assert_eq!(call.send().await.unwrap().status(), 401);
    }

    let admin = |call: RequestBuilder| call.bearer_auth(TOKEN).send();
    let pull = |source: &str| admin(client.post(url("pull")).json(&json!({"source": source})));
    assert_eq!(value(pull("").await.unwrap()).await.0, 400);
    let response = pull("hf:o/r").await.unwrap();
    assert_eq!(response.headers()["content-type"], "application/x-ndjson");
    let text = response.text().await.unwrap();
    let lines: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(lines.len(), 2, "nothing follows the last event");
    assert_eq!((&lines[0]["event"], &lines[1]["message"]), (&json!("verifying"), &json!("the disk is full")));

    assert_eq!(value(admin(client.get(url("models"))).await.unwrap()).await, (200, json!([])));
    let named = |path: &str| admin(client.post(url(path)).json(&json!({"name": "m", "path": "/x.gguf"})));
    let (status, verified) = value(named("models/verify").await.unwrap()).await;
    assert_eq!((status, &verified["done"]), (200, &json!(["read"])));
    assert_eq!(value(named("models/remove").await.unwrap()).await.0, 404);
    assert_eq!(value(named("models/export").await.unwrap()).await.1["done"], json!(["/x.gguf"]));
    assert_eq!(value(admin(client.post(url("models/export")).json(&json!({"name": "m"}))).await.unwrap()).await.0, 400);
}
