//! The API over real HTTP, in front of a scripted node.
mod fake;

use capstan_proto::generate::Prompt;
use capstan_proto::limits::PROMPT_BYTES_MAX;
use fake::{Server, TOKEN};
use reqwest::{Client, RequestBuilder, Response};
use serde_json::{Value, json};
use tokio::sync::oneshot;

async fn post(server: &Server, path: &str, body: Value) -> Response {
    Client::new().post(format!("{}{path}", server.base)).json(&body).send().await.unwrap()
}

async fn chat(server: &Server, extra: Value) -> Response {
    let mut body = json!({"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    post(server, "/v1/chat/completions", body).await
}

/// The status and the error object, whose shape is checked.
async fn error(response: Response) -> (u16, Value) {
    let status = response.status().as_u16();
    let body: Value = response.json().await.unwrap();
    let error = &body["error"];
    assert!(error["message"].as_str().is_some_and(|m| m.len() > 10), "{body}");
    assert!(error["type"].is_string() && error.get("param").is_some() && error.get("code").is_some(), "{body}");
    (status, error.clone())
}

async fn events(response: Response) -> Vec<String> {
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    let text = response.text().await.unwrap();
    text.split("\n\n").filter_map(|e| e.strip_prefix("data: ")).map(str::to_owned).collect()
}

#[tokio::test]
async fn a_chat_in_one_piece() {
    let server = Server::start().await;
    let body: Value = chat(&server, json!({"unknown": 1, "user": "me"})).await.json().await.unwrap();
    assert!(body["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!((&body["object"], &body["model"]), (&json!("chat.completion"), &json!("tiny")));
    assert!(body["created"].as_u64().unwrap() > 1_600_000_000);
    let choice = &body["choices"][0];
    assert_eq!(choice["message"], json!({"role": "assistant", "content": "Héllo!", "refusal": null}));
    assert_eq!((&choice["finish_reason"], &choice["logprobs"]), (&json!("stop"), &Value::Null));
    let usage = &body["usage"];
    assert_eq!(
        (&usage["prompt_tokens"], &usage["completion_tokens"], &usage["total_tokens"]),
        (&json!(7), &json!(3), &json!(10))
    );
    assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 2);
    assert_eq!((&usage["capstan"]["drafted_tokens"], &usage["capstan"]["accepted_tokens"]), (&json!(4), &json!(1)));
}

#[tokio::test]
async fn a_chat_in_chunks() {
    let server = Server::start().await;
    let all = events(chat(&server, json!({"stream": true, "stream_options": {"include_usage": true}})).await).await;
    assert_eq!(all.last().unwrap(), "[DONE]");
    let chunks: Vec<Value> = all[..all.len() - 1].iter().map(|c| serde_json::from_str(c).unwrap()).collect();
    assert!(chunks.iter().all(|c| c["object"] == "chat.completion.chunk" && c["id"] == chunks[0]["id"]));
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    let text: String = chunks.iter().filter_map(|c| c["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(text, "Héllo!");
    let [.., last, usage] = chunks.as_slice() else { panic!() };
    assert_eq!(last["choices"][0]["finish_reason"], "stop");
    assert_eq!(last["usage"], Value::Null);
    assert_eq!((&usage["choices"], &usage["usage"]["total_tokens"]), (&json!([]), &json!(10)));
    assert_eq!(usage["usage"]["prompt_tokens_details"]["cached_tokens"], 2);
    let without = events(chat(&server, json!({"stream": true})).await).await;
    assert!(without.iter().all(|c| !c.contains("\"usage\"")));
}

#[tokio::test]
async fn log_probabilities() {
    let server = Server::start().await;
    let body: Value = chat(&server, json!({"logprobs": true, "top_logprobs": 2})).await.json().await.unwrap();
    let content = body["choices"][0]["logprobs"]["content"].as_array().unwrap().clone();
    assert_eq!(content.len(), 3);
    assert_eq!(content[0]["bytes"], json!([72, 195, 169]));
    assert_eq!(content[0]["top_logprobs"][1]["logprob"], -9999.0);
    let streamed = events(chat(&server, json!({"logprobs": true, "stream": true})).await).await;
    assert_eq!(streamed.iter().filter(|c| c.contains("\"bytes\":")).count(), 3);
    let body = json!({"model": "tiny", "prompt": "a", "logprobs": 2});
    let body: Value = post(&server, "/v1/completions", body).await.json().await.unwrap();
    let logprobs = &body["choices"][0]["logprobs"];
    assert_eq!(logprobs["text_offset"], json!([0, 2, 2]));
    assert_eq!(logprobs["tokens"], json!(["Hé", "", "llo"]));
}

#[tokio::test]
async fn completions_take_text_and_tokens() {
    let server = Server::start().await;
    for (prompt, want) in [
        (json!("a"), Prompt::Text("a".into())),
        (json!(["b"]), Prompt::Text("b".into())),
        (json!([1, 2]), Prompt::Tokens(vec![1, 2])),
        (json!([[3]]), Prompt::Tokens(vec![3])),
    ] {
        let body = json!({"model": "tiny", "prompt": prompt});
        let body: Value = post(&server, "/v1/completions", body).await.json().await.unwrap();
        assert_eq!((&body["object"], &body["choices"][0]["text"]), (&json!("text_completion"), &json!("Héllo!")));
        assert_eq!(server.fake.requests.lock().unwrap().last().unwrap().prompt, want);
    }
    for bad in [json!([]), json!(["a", "b"]), json!({}), json!(null), json!([[1], [2]])] {
        let (status, _) = error(post(&server, "/v1/completions", json!({"model": "tiny", "prompt": bad})).await).await;
        assert_eq!(status, 400);
    }
    let all =
        events(post(&server, "/v1/completions", json!({"model": "tiny", "prompt": "a", "stream": true})).await).await;
    let text: String = all
        .iter()
        .filter_map(|c| serde_json::from_str::<Value>(c).ok())
        .filter_map(|c| c["choices"][0]["text"].as_str().map(str::to_owned))
        .collect();
    assert_eq!((text.as_str(), all.last().unwrap().as_str()), ("Héllo!", "[DONE]"));
}

#[tokio::test]
async fn settings_arrive() {
    let server = Server::start().await;
    let settings = json!({
        "max_tokens": 5, "max_completion_tokens": 6, "temperature": 0, "top_p": 0.5, "top_k": 7, "min_p": 0.1,
        "repetition_penalty": 1.5, "frequency_penalty": 0.25, "presence_penalty": -0.25, "seed": 42, "n": 1,
        "logit_bias": {"12": -100, "3": 1.5}, "stop": "end", "ignore_eos": true, "tool_choice": "auto",
        "tools": [{"type": "function", "function": {"name": "f"}}], "response_format": {"type": "text"},
        "chat_template_kwargs": {"enable_thinking": false},
    });
    assert_eq!(chat(&server, settings).await.status(), 200);
    let request = server.fake.requests.lock().unwrap().pop().unwrap();
    let s = &request.sampling;
    assert_eq!((request.max_tokens, s.temperature, s.top_p, s.top_k, s.min_p), (Some(6), 0.0, 0.5, 7, 0.1));
    assert_eq!((s.repeat_penalty, s.frequency_penalty, s.presence_penalty, s.seed), (1.5, 0.25, -0.25, Some(42)));
    assert_eq!((s.logit_bias.len(), request.stop, request.ignore_eos), (2, vec!["end".to_owned()], true));
    let Prompt::Chat { messages, tools, template_kwargs } = request.prompt else { panic!() };
    assert_eq!(messages, r#"[{"role":"user","content":"Hi"}]"#);
    assert_eq!(tools.unwrap(), r#"[{"type":"function","function":{"name":"f"}}]"#);
    assert_eq!(template_kwargs.unwrap(), r#"{"enable_thinking":false}"#);
    assert_eq!(
        chat(&server, json!({"stop": null, "seed": null, "tools": null, "tool_choice": "none"})).await.status(),
        200
    );
}

#[tokio::test]
async fn what_is_not_supported_is_a_sentence() {
    let server = Server::start().await;
    for (param, value) in [
        ("n", json!(2)),
        ("tool_choice", json!("required")),
        ("response_format", json!({"type": "json_object"})),
        ("top_logprobs", json!(3)),
        ("top_k", json!(-5)),
        ("logit_bias", json!({"x": 1})),
        ("messages", json!([])),
        ("messages", json!("hi")),
        ("max_tokens", json!(-1)),
        ("temperature", json!("hot")),
    ] {
        let (status, error) = error(chat(&server, json!({param: value})).await).await;
        assert_eq!((status, &error["param"]), (400, &json!(param)), "{error}");
    }
    for extra in [
        json!({"temperature": 1e9}),
        json!({"max_tokens": 0}),
        json!({"stop": ["", "a"]}),
        json!({"stop": vec!["a"; 99]}),
    ] {
        assert_eq!(error(chat(&server, extra).await).await.0, 400);
    }
    let echo = json!({"model": "tiny", "prompt": "a", "echo": true});
    assert_eq!(error(post(&server, "/v1/completions", echo).await).await.0, 400);
}

#[tokio::test]
async fn failures_have_the_right_status() {
    let server = Server::start().await;
    for stream in [false, true] {
        for (model, want, code, retry) in [
            ("busy", 429, "queue_full", true),
            ("long", 400, "context_length_exceeded", false),
            ("away", 503, "unavailable", true),
            ("nothing", 404, "model_not_found", false),
        ] {
            let response = chat(&server, json!({"model": model, "stream": stream})).await;
            assert_eq!(response.headers().contains_key("retry-after"), retry, "{model}");
            let (status, error) = error(response).await;
            assert_eq!((status, &error["code"]), (want, &json!(code)), "{model}");
        }
    }
    let (_, missing) = error(chat(&server, json!({"model": "nothing"})).await).await;
    assert!(missing["message"].as_str().unwrap().contains("tiny"));
    let (status, unnamed) = error(chat(&server, json!({"model": null})).await).await;
    assert_eq!((status, &unnamed["param"]), (400, &json!("model")));
    assert_eq!(error(chat(&server, json!({"model": "lost"})).await).await.0, 503);
    assert_eq!(error(chat(&server, json!({"model": "broken"})).await).await.0, 500);
}

#[tokio::test]
async fn a_failure_in_midstream_is_the_last_event() {
    let server = Server::start().await;
    for (model, code) in [("lost", "stage_lost"), ("broken", "internal_error")] {
        let all = events(chat(&server, json!({"model": model, "stream": true})).await).await;
        assert!(all.iter().any(|c| c.contains("Hé")) && !all.contains(&"[DONE]".to_owned()));
        let last: Value = serde_json::from_str(all.last().unwrap()).unwrap();
        assert_eq!(last["error"]["code"], code);
    }
}

#[tokio::test]
async fn malformed_bodies_and_wrong_routes() {
    let server = Server::start().await;
    let client = Client::new();
    let url = |path: &str| format!("{}{path}", server.base);
    let raw = |body: &'static str| client.post(url("/v1/chat/completions")).body(body).send();
    for (body, place) in [
        ("{\"model\": \"tiny\",\n nonsense}", "line 2"),
        ("", "empty"),
        ("[]", "JSON"),
        ("{} x", "JSON"),
        ("\u{1}", "JSON"),
    ] {
        let (status, error) = error(raw(body).await.unwrap()).await;
        assert!(status == 400 && error["message"].as_str().unwrap().contains(place), "{body:?}: {error}");
    }
    let deep = client.post(url("/v1/chat/completions")).body("[".repeat(1 << 20)).send().await.unwrap();
    assert_eq!(error(deep).await.0, 400);
    let large = client.post(url("/v1/completions")).body(vec![b' '; PROMPT_BYTES_MAX + 1]).send().await.unwrap();
    assert_eq!(error(large).await.0, 413);
    assert_eq!(error(client.get(url("/nowhere")).send().await.unwrap()).await.0, 404);
    assert_eq!(error(client.get(url("/capstan/v1/nowhere")).send().await.unwrap()).await.0, 404);
    assert_eq!(error(client.get(url("/v1/chat/completions")).send().await.unwrap()).await.0, 405);
    assert_eq!(error(client.delete(url("/v1/models")).send().await.unwrap()).await.0, 405);
}

#[tokio::test]
async fn models_and_health() {
    let server = Server::start().await;
    let get = async |path: &str| reqwest::get(format!("{}{path}", server.base)).await.unwrap();
    let list: Value = get("/v1/models").await.json().await.unwrap();
    assert_eq!(
        (&list["object"], &list["data"][0]["id"], &list["data"][0]["object"]),
        (&json!("list"), &json!("tiny"), &json!("model"))
    );
    for path in ["/v1/models/org/slash", "/v1/models/org%2Fslash"] {
        let one: Value = get(path).await.json().await.unwrap();
        assert_eq!(one["id"], "org/slash");
    }
    let (status, missing) = error(get("/v1/models/nothing").await).await;
    assert_eq!((status, &missing["code"]), (404, &json!("model_not_found")));
    let health: Value = get("/health").await.json().await.unwrap();
    assert_eq!((&health["status"], &health["version"]), (&json!("ok"), &json!("1.2.3")));
}

#[tokio::test]
async fn a_client_that_goes_away_cancels() {
    let server = Server::start().await;
    // While it streams, while it waits for its first event, and while it waits for the whole answer.
    for (model, stream) in [("endless", true), ("silent", true), ("endless", false), ("silent", false)] {
        let (sender, dropped) = oneshot::channel();
        *server.fake.dropped.lock().unwrap() = Some(sender);
        let before = server.fake.requests.lock().unwrap().len();
        let body = json!({"model": model, "stream": stream, "messages": [{"role": "user", "content": "Hi"}]});
        let mut request =
            Box::pin(Client::new().post(format!("{}/v1/chat/completions", server.base)).json(&body).send());
        if model == "endless" && stream {
            let mut response = request.await.unwrap();
            assert!(response.chunk().await.unwrap().is_some());
            drop(response);
        } else {
            // The request is driven until the node has it, and then dropped.
            while server.fake.requests.lock().unwrap().len() == before {
                tokio::select! {
                    _ = &mut request => panic!("an endless answer ended"),
                    () = tokio::task::yield_now() => {}
                }
            }
            drop(request);
        }
        dropped.await.unwrap();
    }
}

#[tokio::test]
async fn management_needs_the_token() {
    let server = Server::start().await;
    let client = Client::new();
    let url = |path: &str| format!("{}/capstan/v1/{path}", server.base);
    let calls: Vec<RequestBuilder> = [client.get(url("status"))]
        .into_iter()
        .chain(["load", "unload", "ticket", "join", "leave", "stop"].map(|p| client.post(url(p)).body("{}")))
        .collect();
    for call in calls {
        for header in [
            None,
            Some("Bearer"),
            Some("Bearer "),
            Some("Bearer wrong"),
            Some("Basic 0123abcd"),
            Some("Bearer 0123abcde"),
        ] {
            let call = call.try_clone().unwrap();
            let call = if let Some(h) = header { call.header("authorization", h) } else { call };
            let (status, error) = error(call.send().await.unwrap()).await;
            assert_eq!((status, &error["type"]), (401, &json!("authentication_error")), "{header:?}");
        }
    }
    let admin = |call: RequestBuilder| call.bearer_auth(TOKEN).send();
    let status: Value = admin(client.get(url("status"))).await.unwrap().json().await.unwrap();
    assert_eq!(status["version"], "1.2.3");
    let ticket: Value =
        admin(client.post(url("ticket")).json(&json!({"ttl_s": 60}))).await.unwrap().json().await.unwrap();
    assert_eq!((&ticket["expires_unix_s"], &ticket["reusable"]), (&json!(60), &json!(false)));
    let unload = admin(client.post(url("unload")).json(&json!({"name": "x"}))).await.unwrap();
    assert_eq!(error(unload).await.0, 404);
    assert_eq!(error(admin(client.post(url("unload")).json(&json!({"nam": "x"}))).await.unwrap()).await.0, 400);
    assert_eq!(error(admin(client.post(url("join")).json(&json!({"ticket": "x"}))).await.unwrap()).await.0, 500);
    assert_eq!(admin(client.post(url("leave"))).await.unwrap().status(), 200);
    assert_eq!(error(admin(client.post(url("stop?now=soon"))).await.unwrap()).await.0, 400);
    assert_eq!(admin(client.post(url("stop?now=true"))).await.unwrap().status(), 200);
    assert_eq!(admin(client.post(url("stop"))).await.unwrap().status(), 200);
}

#[tokio::test]
async fn a_load_is_told_line_by_line_and_goes_on_without_a_listener() {
    let server = Server::start().await;
    let load = |path: &str| {
        let body = json!({"path": path});
        Client::new().post(format!("{}/capstan/v1/load", server.base)).bearer_auth(TOKEN).json(&body).send()
    };
    assert_eq!(error(load("").await.unwrap()).await.0, 400);
    let response = load("a.gguf").await.unwrap();
    assert_eq!(response.headers()["content-type"], "application/x-ndjson");
    let text = response.text().await.unwrap();
    let lines: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!((lines.len(), &lines[0]["event"], &lines[100]["event"]), (101, &json!("loaded"), &json!("ready")));
    let (sender, loaded) = oneshot::channel();
    *server.fake.loaded.lock().unwrap() = Some(sender);
    let mut response = load("a.gguf").await.unwrap();
    assert!(response.chunk().await.unwrap().is_some());
    drop(response);
    loaded.await.unwrap();
}

#[tokio::test]
async fn foreign_hosts_and_origins_are_refused() {
    let server = Server::start().await;
    let get = |name: &'static str, value: &str| {
        Client::new().get(format!("{}/v1/models", server.base)).header(name, value.to_owned()).send()
    };
    assert_eq!(error(get("host", "evil.example").await.unwrap()).await.0, 403);
    assert_eq!(error(get("origin", "https://evil.example").await.unwrap()).await.0, 403);
    let own = get("origin", &server.base).await.unwrap();
    assert!(own.status() == 200 && !own.headers().contains_key("access-control-allow-origin"));
}

#[tokio::test]
async fn shutdown_ends_the_server() {
    let mut server = Server::start().await;
    assert_eq!(chat(&server, json!({})).await.status(), 200);
    server.stop.take().unwrap().send(()).unwrap();
    server.task.take().unwrap().await.unwrap().unwrap();
    assert!(reqwest::get(format!("{}/health", server.base)).await.is_err());
}
