//! Headers made up from shapes, beside what the shapes themselves tell.
use capstan_planner::header::{self, ARCHITECTURES, HeaderError};
use capstan_planner::models::{self, MODELS};

/// Norms and biases that shapes do not count, and what types cannot come nearer to.
const TOLERANCE: f64 = 0.004;

fn near(what: &str, found: u64, expected: u64) {
    let off = (found as f64 - expected as f64).abs() / (expected as f64).max(1.0);
    assert!(off < TOLERANCE, "{what}: {found} instead of {expected}");
}

#[test]
fn a_made_up_header_tells_what_the_shape_tells() {
    let mut seen = std::collections::BTreeSet::new();
    for known in MODELS {
        for q in known.quantisations() {
            let what = format!("{} {}", known.name, q.name);
            let model = match header::model(&known.shape, known.name, q) {
                Ok(model) => model,
                Err(HeaderError::Unknown { architecture }) => {
                    assert!(!ARCHITECTURES.contains(&architecture.as_str()));
                    continue;
                }
                Err(error) => panic!("{what}: {error}"),
            };
            seen.insert(known.shape.architecture);
            let (found, expected) = (model.profile(), known.shape.profile(known.name, q));
            assert_eq!(
                (found.n_layers, found.n_embd, found.n_vocab),
                (expected.n_layers, expected.n_embd, expected.n_vocab)
            );
            assert_eq!(
                (found.n_head, found.context_train, found.tied),
                (expected.n_head, expected.context_train, expected.tied)
            );
            near(&what, found.total_weights, expected.total_weights);
            // Rows that are no whole blocks of 256 have few types, here as in files; OpenAI's own is among them.
            let widths = [known.shape.n_embd, known.shape.dense_width, known.shape.experts.map_or(0, |e| e.width)];
            if widths.iter().all(|w| w.is_multiple_of(256)) || q.name == "MXFP4" {
                near(&what, found.total_bytes, expected.total_bytes);
            }
            for (found, expected) in found.layers.iter().zip(&expected.layers) {
                assert_eq!((found.experts, found.experts_used), (expected.experts, expected.experts_used), "{what}");
                assert_eq!(found.kv_bytes_per_token, expected.kv_bytes_per_token, "{what}");
                assert_eq!(found.window_tokens, expected.window_tokens, "{what}");
                assert_eq!(found.attention_flops_per_position, expected.attention_flops_per_position, "{what}");
                near(&what, found.expert_weights, expected.expert_weights);
                near(&what, found.active_weights, expected.active_weights);
            }
            if q.name != known.usual().name {
                continue;
            }
            // The same windows may be stages.
            let windows = known.shape.windows();
            assert_eq!(model.finest_partition(), windows.finest_partition(), "{what}");
            for range in windows.finest_partition() {
                assert!(model.shard_header(range).is_ok(), "{what} {range}");
            }
        }
    }
    assert_eq!(seen.into_iter().collect::<Vec<_>>().len(), ARCHITECTURES.len(), "every architecture has a model");
}

#[test]
fn kimi_has_a_trillion_weights_in_the_bytes_that_are_published() {
    let (known, q) = models::find("Kimi K2.5").unwrap();
    let model = header::model(&known.shape, known.name, q).unwrap();
    let profile = model.profile();
    assert!((1.02e12..1.03e12).contains(&(profile.total_weights as f64)), "{}", profile.total_weights);
    near("bytes", profile.total_bytes, 374_764_330_144);
    assert_eq!(model.leading_dense(), 1);

    // An excerpt keeps the head, and dense and other layers as they are.
    let range = capstan_proto::LayerRange::new(0, 4).unwrap();
    let (bytes, total) = model.excerpt_header(range, true).unwrap();
    let four = capstan_gguf::synthetic::model(&bytes, total, "four.gguf".as_ref()).unwrap();
    assert_eq!((four.n_layers(), four.n_vocab(), four.leading_dense()), (4, 163_840, 1));
    assert_eq!(four.profile().layers[..], profile.layers[..4]);
    assert_eq!(four.profile().output_bytes, profile.output_bytes);
}
