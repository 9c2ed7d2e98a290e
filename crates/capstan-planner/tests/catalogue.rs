//! The catalogues are right where that can be checked, and every model is planned for on every machine.
use capstan_planner::links::{self, Links};
use capstan_planner::machines::{self, MACHINES, Machine};
use capstan_planner::models::{self, MODELS};
use capstan_planner::{Objective, Question, Subject, Unfit, answer, machines_for, place};

#[test]
fn shapes_have_the_published_number_of_weights() {
    for model in MODELS {
        let billion = model.shape.total_weights() as f64 / 1e9;
        let off = billion / model.published_billion - 1.0;
        println!(
            "{}: {billion:.2} billion weights, published {} ({:+.2} %)",
            model.name,
            model.published_billion,
            off * 100.0
        );
        assert!(off.abs() < 0.01, "{}: {billion} billion, published {}", model.name, model.published_billion);
        if let Some(published) = model.published_active_billion {
            let active = model.shape.active_weights() as f64 / 1e9;
            println!("    of which active {active:.2}, published {published}");
            // Makers round these, and count the embedding table or not.
            assert!((active / published - 1.0).abs() < 0.2, "{}: {active} active, published {published}", model.name);
        }
        assert!(model.source.starts_with("https://"));
    }
}

#[test]
fn a_profile_adds_up_and_has_the_size_of_the_file() {
    for model in MODELS {
        for q in model.quantisations() {
            let p = model.shape.profile(model.name, q);
            let head = if p.tied { 0 } else { p.output_bytes - 4 * u64::from(p.n_embd) };
            let parts = p.layers.iter().map(|l| l.weight_bytes).sum::<u64>() + p.embedding_bytes + head;
            assert!(p.total_bytes.abs_diff(parts + 4 * u64::from(p.n_embd)) < 16, "{} {}", model.name, q.name);
            if let Some(file) = q.file_bytes {
                let off = p.total_bytes as f64 / file as f64 - 1.0;
                assert!(off.abs() < 1e-4, "{} {}: {} bytes for {file}", model.name, q.name, p.total_bytes);
                let fitted = q.fitted(&model.shape);
                println!(
                    "{} {}: {:.3} bits a routed weight, {:.3} in attention",
                    model.name, q.name, fitted.routed_bits, fitted.attention_bits
                );
                assert!((2.0..9.0).contains(&fitted.routed_bits), "{} {}", model.name, q.name);
            }
            for l in &p.layers {
                assert!(l.active_bytes <= l.weight_bytes && l.expert_bytes <= l.weight_bytes);
                assert!((l.distinct_experts(1) - f64::from(l.experts_used)).abs() < 1e-6);
                assert!(l.distinct_experts(100_000) <= f64::from(l.experts));
                let per_expert = l.expert_bytes.checked_div(u64::from(l.experts)).unwrap_or(0);
                let active = l.shared_bytes() + per_expert * u64::from(l.experts_used);
                assert!(active.abs_diff(l.active_bytes) < 16, "{} {}", model.name, q.name);
            }
        }
    }
}

/// Figures of the design that were read from files: f16 KV of Kimi K2.5 is 70,272 bytes a token, 31.7 billion weights are
/// active.
#[test]
fn kimi_is_as_its_files_say() {
    let (model, q) = models::find("kimi-k2.5:ud-q2_k_xl").unwrap();
    let p = model.shape.profile(model.name, q);
    assert_eq!(p.layers.iter().map(|l| l.kv_bytes_per_token).sum::<u64>(), 70_272);
    assert_eq!(p.total_bytes.div_ceil(1_000_000), 374_764_330_144u64.div_ceil(1_000_000));
    assert!((model.shape.active_weights() as f64 / 1e9 - 31.7).abs() < 0.1);
    assert_eq!(p.layers.iter().filter(|l| l.experts == 384).count(), 60);
}

#[test]
fn names_are_found_in_any_spelling_and_answered_with_the_nearest() {
    for model in MODELS {
        for name in [&model.name].into_iter().chain(model.aliases) {
            assert_eq!(models::find(&name.to_uppercase()).unwrap().0.name, model.name);
        }
    }
    let said = |name: &str| models::find(name).unwrap_err().to_string();
    assert!(said("kimi k3").contains("Kimi K2"), "{}", said("kimi k3"));
    assert!(said("qwen3 235").contains("Qwen3-235B-A22B"), "{}", said("qwen3 235"));
    for spelt in ["Kimi K2.5 UD-Q2_K_XL", "kimi-k2.5-ud-q2-k-xl", "moonshotai/kimi-k2.5: ud-q2_k_xl"] {
        let (model, q) = models::find(spelt).unwrap();
        assert_eq!((model.name, q.name), ("Kimi K2.5", "UD-Q2_K_XL"), "{spelt}");
    }
    assert_eq!(models::find("glm 4.6 q8_0").unwrap().1.name, "Q8_0");
    assert!(said("GLM-4.6:Q4_K_L").contains("Q4_K_M"), "{}", said("GLM-4.6:Q4_K_L"));
    for machine in MACHINES {
        for variant in machine.variants() {
            assert_eq!(machines::find(&variant.name).unwrap(), variant);
        }
        assert!(machine.reached.bandwidth <= 1.0 && machine.reached.gemm <= 1.0);
    }
}

/// The fewest for a wanted speed, and none for one that no number of them reaches.
#[test]
fn so_many_machines_for_so_many_tokens_per_second() {
    let (model, quantisation) = models::find("Llama 3.1 70B").unwrap();
    let subject = Subject::known(model, quantisation);
    let links = Links::all(links::parse("10GbE").unwrap());
    let machines = machines::parse("RTX 3090").unwrap();
    let question = Question {
        subject: &subject,
        machines: &machines,
        links: &links,
        ctx: 1024,
        slots: 64,
        ubatch: 512,
        headroom_bytes: 0,
        objective: Objective::Throughput,
        wishes: &[],
    };
    let (few, slow) = machines_for(&question, 1.0).unwrap();
    let said = answer(&question).unwrap_err().to_string();
    assert!(said.contains(&format!("It would fit on {few} of RTX 3090 24GB.")), "{said}");
    let (many, fast) = machines_for(&question, slow * 1.2).unwrap();
    assert!(few > 2 && many > few && fast >= slow * 1.2, "{few} {slow} {many} {fast}");
    assert_eq!(machines_for(&question, 1e9), None);
}

/// Every quantisation of every model on one to eight of every machine, with a short and a long context: nothing is placed
/// beyond what fits, and every layer is placed once.
#[test]
fn everything_everywhere() {
    let links = Links::all(links::parse("5GbE").unwrap());
    let (mut fits, mut not) = (0, 0);
    for (no, model) in MODELS.iter().enumerate() {
        for (i, q) in model.quantisations().enumerate() {
            let subject = Subject::known(model, q);
            for (j, machine) in MACHINES.iter().flat_map(|m| m.variants().collect::<Vec<Machine>>()).enumerate() {
                let machines = vec![machine; 8];
                for count in 1..=8 {
                    let question = Question {
                        subject: &subject,
                        machines: &machines[..count],
                        links: &links,
                        ctx: if (i + j + count) % 2 == 0 { 2048 } else { 65_536 },
                        slots: 1 + (no as u32 + j as u32) % 4,
                        ubatch: 512,
                        headroom_bytes: (j as u64 % 3) << 30,
                        objective: [Objective::Latency, Objective::Balanced, Objective::Throughput][(i + count) % 3],
                        wishes: &[],
                    };
                    let Some(placed) = place(&question).unwrap() else {
                        not += 1;
                        continue;
                    };
                    fits += 1;
                    let mut at = 0;
                    for stage in &placed {
                        assert_eq!(stage.layers.start(), at);
                        at = stage.layers.end();
                        assert!(stage.need.total() <= stage.usable_bytes, "{} on {}", subject.name, stage.machine);
                    }
                    assert!(at == model.shape.n_layers && placed.len() <= count);
                }
            }
        }
    }
    println!("{fits} fit, {not} do not");
    assert!(fits > 5000 && not > 5000);
}

/// Whatever the model and the machines: no panic, nothing placed beyond what fits, and a sentence where nothing fits.
#[test]
fn every_model_on_every_machine() {
    let links = Links::all(links::parse("5GbE").unwrap());
    let (mut fits, mut not) = (0, 0);
    for model in MODELS {
        for q in [model.usual(), model.quantisation("Q8_0").unwrap()] {
            let subject = Subject::known(model, q);
            for machine in MACHINES.iter().flat_map(|m| m.variants().collect::<Vec<Machine>>()) {
                for count in [1, 4] {
                    let machines = vec![machine.clone(); count];
                    let objective = if count % 4 == 0 { Objective::Throughput } else { Objective::Latency };
                    let question = Question {
                        subject: &subject,
                        machines: &machines,
                        links: &links,
                        ctx: 8192,
                        slots: 2,
                        ubatch: 512,
                        headroom_bytes: 0,
                        objective,
                        wishes: &[],
                    };
                    match answer(&question) {
                        Ok(a) => {
                            fits += 1;
                            let placed: u64 = a.forecast.memory.iter().map(|m| m.weight_bytes).sum();
                            assert!(
                                placed >= subject.profile.total_bytes - subject.profile.embedding_bytes,
                                "{}",
                                a.model
                            );
                            for m in &a.forecast.memory {
                                assert!(
                                    m.weight_bytes + m.kv_bytes + m.compute_bytes <= m.usable_bytes,
                                    "{} on {}",
                                    a.model,
                                    m.machine
                                );
                            }
                            assert!(a.fewest <= a.stages.len() && a.stages.len() <= count && a.exact);
                            assert!(a.ctx_max >= 8192);
                            let all = a.forecast.decode.iter().map(|d| d.tokens_per_s);
                            assert!(
                                all.chain(a.forecast.first_token.iter().map(|f| f.seconds))
                                    .all(|x| x.is_finite() && x > 0.0)
                            );
                        }
                        Err(Unfit::Memory(lines)) => {
                            not += 1;
                            assert!(lines[0].contains("does not fit"), "{lines:?}");
                        }
                        Err(other) => panic!("{}: {other}", subject.name),
                    }
                }
            }
        }
    }
    println!("{fits} fit, {not} do not");
    assert!(fits > 500 && not > 500);
}
