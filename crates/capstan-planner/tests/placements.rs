//! Placements cover every layer once, keep to the windows and the memory, and are found whenever one exists.
use capstan_planner::timing::Times;
use capstan_planner::{Links, NodeResources, Placement, PlanError, PlanInput, PlanOptions, Sizes, links, plan};
use capstan_proto::{LayerRange, NodeId};
use proptest::prelude::*;

fn id(n: usize) -> NodeId {
    NodeId([n as u8 + 1; 32])
}

fn nodes(free: &[u64]) -> Vec<NodeResources> {
    free.iter()
        .enumerate()
        .map(|(i, &free)| NodeResources { id: id(i), name: format!("n{i}"), free_bytes: free << 20, times: None })
        .collect()
}

fn sizes(layers: &[u64], ends: u64) -> Sizes {
    Sizes {
        weight_bytes: layers.iter().map(|mib| mib << 20).collect(),
        kv_bytes_per_token: vec![1024; layers.len()],
        state_bytes_per_sequence: vec![0; layers.len()],
        // Here a layer takes as long as it is large, and the head as long as the ends.
        work_ps: layers.to_vec(),
        head_work_ps: ends,
        ends_bytes: ends << 20,
        n_embd: 64,
        n_vocab: 32,
        n_head: 0,
        buffers: None,
    }
}

fn options(nodes: Vec<NodeId>) -> PlanOptions {
    PlanOptions { ctx: 64, slots: 1, ubatch: 32, nodes, ..PlanOptions::default() }
}

fn range(a: u32, b: u32) -> LayerRange {
    LayerRange::new(a, b).unwrap()
}

/// The largest work of a stage, and the sum of need²/free.
type Cost = (u64, f64);

/// The cheapest cut of the layers over these nodes, in this order, that is allowed and fits.
fn brute(sizes: &Sizes, free: &[u64], ok: &dyn Fn(LayerRange) -> bool, from: u32) -> Option<Cost> {
    let n = sizes.layers();
    let Some((&first, rest)) = free.split_first() else { return (from == n).then_some((0, 0.0)) };
    let cuts = (from + 1..=n).filter_map(|end| {
        let r = range(from, end);
        let need = sizes.need(r, 64, 1, 32).total();
        if (r.count() < n && !ok(r)) || need > first << 20 {
            return None;
        }
        let (most, sum) = brute(sizes, rest, ok, end)?;
        Some((most.max(sizes.work(r)), sum + need as f64 * need as f64 / (first << 20) as f64))
    });
    cuts.min_by(|a, b| a.partial_cmp(b).unwrap())
}

fn permutations(of: &[u64], k: usize) -> Vec<Vec<u64>> {
    if k == 0 {
        return vec![vec![]];
    }
    (0..of.len())
        .flat_map(|i| {
            let mut rest = of.to_vec();
            let one = rest.remove(i);
            permutations(&rest, k - 1).into_iter().map(move |mut p| {
                p.push(one);
                p
            })
        })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn found_and_as_good_as_what_brute_force_finds(
        layers in prop::collection::vec(1u64..60, 1..8),
        ends in 0u64..60,
        free in prop::collection::vec(1u64..260, 1..5),
        forbidden in prop::collection::hash_set((0u32..8, 1u32..9), 0..12),
        named in any::<bool>(),
    ) {
        let sizes = sizes(&layers, ends);
        let ok = |r: LayerRange| !forbidden.contains(&(r.start(), r.end()));
        let problem = |r: LayerRange| (!ok(r)).then(|| "a test says so".to_owned());
        let wanted = if named { (0..free.len()).map(id).collect() } else { vec![] };
        let input = PlanInput {
            nodes: nodes(&free), links: None, sizes: &sizes, window_problem: &problem, split_problem: None, options: options(wanted),
        };
        let fewest = if named {
            brute(&sizes, &free, &ok, 0).map(|_| free.len())
        } else {
            (1..=free.len()).find(|&k| permutations(&free, k).iter().any(|p| brute(&sizes, p, &ok, 0).is_some()))
        };
        match plan(&input) {
            Ok(placement) => {
                prop_assert_eq!(Some(placement.stages().len()), fewest);
                let mut at = 0;
                for stage in placement.stages() {
                    prop_assert_eq!(stage.layers.start(), at);
                    at = stage.layers.end();
                    let node = input.nodes.iter().find(|n| n.id == stage.node).unwrap();
                    prop_assert!(stage.memory_bytes <= node.free_bytes);
                    prop_assert!(stage.layers.count() == sizes.layers() || ok(stage.layers));
                }
                prop_assert_eq!(at, sizes.layers());
                let free: Vec<_> = placement.stages().iter().map(|s| free[usize::from(s.node.0[0]) - 1]).collect();
                let (most, _) = brute(&sizes, &free, &ok, 0).expect("it was placed");
                prop_assert_eq!(placement.stages().iter().map(|s| sizes.work(s.layers)).max(), Some(most));
                // Of those that are as fast, the one that lies most in proportion: brute force again, slower ones
                // forbidden, the sum alone.
                let square = |need: u64, free: u64| (need as f64).powi(2) / (free << 20) as f64;
                let fast = |r: LayerRange| ok(r) && sizes.work(r) <= most;
                let (_, sum) = brute(&Sizes { work_ps: vec![0; layers.len()], head_work_ps: 0, ..sizes.clone() },
                    &free, &fast, 0).expect("it was placed");
                let found: f64 = placement.stages().iter().zip(&free).map(|(s, &f)| square(s.memory_bytes, f)).sum();
                prop_assert!((found / sum - 1.0).abs() < 1e-9, "{} for {}", found, sum);
            }
            Err(error) => {
                prop_assert_eq!(fewest, None, "{}", error);
                prop_assert!(error.to_string().len() > 20);
            }
        }
    }
}

fn counts(sizes: &Sizes, free: &[u64], order: Vec<NodeId>) -> (Vec<u32>, Vec<String>) {
    let input = PlanInput {
        nodes: nodes(free),
        links: None,
        sizes,
        window_problem: &|_| None,
        split_problem: None,
        options: options(order),
    };
    let placement = plan(&input).unwrap();
    (placement.stages().iter().map(|s| s.layers.count()).collect(), placement.explanation().to_vec())
}

#[test]
fn the_stages_work_equally_long_whatever_memory_is_free() {
    let even = sizes(&[10; 30], 0);
    let (layers, why) = counts(&even, &[400, 600, 900], vec![id(2), id(0), id(1)]);
    assert_eq!(layers, [10, 10, 10]);
    assert!(why[1].contains("about equally long") && why[2].contains("33 % of the work"), "{why:?}");
    // Too little memory for ten layers on the node that comes second: the others share the rest.
    let (layers, why) = counts(&even, &[100, 600, 900], vec![id(2), id(0), id(1)]);
    assert!(layers[1] < 6 && layers[0].abs_diff(layers[2]) <= 1, "{layers:?}");
    assert!(why[1].contains("free memory decides"), "{why:?}");
    // Equal work leaves a choice: the roomier node takes the layer that is over.
    assert_eq!(counts(&sizes(&[10; 5], 0), &[900, 300], vec![id(0), id(1)]).0, [3, 2]);
    assert_eq!(counts(&sizes(&[10; 5], 0), &[300, 900], vec![id(0), id(1)]).0, [2, 3]);
}

#[test]
fn the_head_counts_as_work_of_the_last_stage() {
    // Qwen2.5-Coder-0.5B in 4 bits, as measured: its head takes as long as eleven of its 24 layers.
    let mut qwen = sizes(&[8; 24], 140);
    (qwen.work_ps, qwen.head_work_ps) = (vec![1_703_000_000; 24], 19_048_000_000);
    assert_eq!(counts(&qwen, &[4000, 4000], vec![id(0), id(1)]).0, [18, 6]);
}

#[test]
fn guesses_and_a_draft_model_take_memory_of_pipelines_only() {
    let sizes = sizes(&[10; 4], 0);
    let base = PlanOptions { spares_per_stage: 1, draft_bytes: 50 << 20, ..options(vec![id(0), id(1)]) };
    let place = |options| {
        let (nodes, window_problem) = (nodes(&[500, 500]), &|_| None);
        plan(&PlanInput { nodes, links: None, sizes: &sizes, window_problem, split_problem: None, options }).unwrap()
    };
    let two = place(base.clone());
    let need = |range, sequences| sizes.need(range, 64, sequences, 32).total();
    assert_eq!(two.stages()[0].memory_bytes, need(range(0, 2), 3));
    assert_eq!(two.stages()[1].memory_bytes, need(range(2, 4), 3) + (50 << 20));
    let one = place(PlanOptions { nodes: vec![id(0)], ..base });
    assert_eq!(one.stages()[0].memory_bytes, need(range(0, 4), 1));
}

#[test]
fn refusals_say_what_is_wrong() {
    let sizes = sizes(&[100; 6], 50);
    let base = |options: PlanOptions, split: Option<&str>| {
        plan(&PlanInput {
            nodes: nodes(&[400, 300]),
            links: None,
            sizes: &sizes,
            window_problem: &|r| (r.start() == 1).then(|| "layer 1 needs layer 0".to_owned()),
            split_problem: split.map(str::to_owned),
            options,
        })
    };
    let layers = |l: Vec<(NodeId, LayerRange)>| PlanOptions { layers: l, ..options(vec![]) };
    let says = |options, text: &str| {
        let message = base(options, None).unwrap_err().to_string();
        assert!(message.contains(text), "{message}");
    };
    says(layers(vec![(id(0), range(0, 3)), (id(1), range(4, 6))]), "3..4 are on no node");
    says(layers(vec![(id(0), range(0, 3)), (id(1), range(2, 6))]), "begins before");
    says(layers(vec![(id(0), range(0, 3)), (id(1), range(3, 7))]), "past the end");
    says(layers(vec![(id(0), range(0, 3))]), "3..6 are on no node");
    says(layers(vec![(id(0), range(0, 1)), (id(1), range(1, 6))]), "layer 1 needs layer 0");
    says(layers(vec![(id(0), range(0, 5)), (id(1), range(5, 6))]), "n0 lacks");
    says(options(vec![id(7)]), "no member");
    says(options(vec![id(0), id(0)]), "twice");
    says(options(vec![]), "not enough memory: the model needs");
    let whole = base(options(vec![id(0), id(1)]), Some("this architecture shares a cache")).unwrap_err();
    assert_eq!(whole, PlanError::OnlyWhole("this architecture shares a cache".into()));
}

/// Nodes that were measured: the fast one gets more layers, and a slow one none where it is not needed.
#[test]
fn measured_nodes_get_what_they_can_do() {
    let sizes = sizes(&[100; 12], 100);
    let measured = |free: &[u64], ms: &[f64]| -> Vec<NodeResources> {
        let times = |ms: f64| Times { layers_s: vec![ms / 1e3; 12], head_s: ms / 1e3 };
        let nodes = nodes(free).into_iter().zip(ms);
        nodes.map(|(n, &ms)| NodeResources { times: Some(times(ms)), ..n }).collect()
    };
    let place = |nodes: Vec<NodeResources>| {
        let options = PlanOptions { ctx: 256, slots: 1, ubatch: 32, ..PlanOptions::default() };
        let links = Some(Links::all(links::parse("1GbE").unwrap()));
        let problem = &|_| None;
        plan(&PlanInput { nodes, links, sizes: &sizes, window_problem: problem, split_problem: None, options }).unwrap()
    };
    let layers = |p: &Placement| -> Vec<_> { p.stages().iter().map(|s| (s.node, s.layers.count())).collect() };
    // Neither holds it alone: the one that is three times as fast takes three times the work, whoever has the head.
    let two = place(measured(&[1150, 1150], &[3.0, 1.0]));
    let fast = layers(&two).into_iter().find(|(node, _)| *node == id(1)).map(|(_, n)| n);
    assert!(fast == Some(9) || fast == Some(10), "{:?}", two.explanation());
    // One holds it alone and is fast enough: nothing is sent.
    assert_eq!(layers(&place(measured(&[4000, 4000], &[1.05, 1.0]))), [(id(0), 12)]);
    // The other is twice as fast.
    assert_eq!(layers(&place(measured(&[4000, 4000], &[2.0, 1.0]))), [(id(1), 12)]);
    // Of three the slow one is left out.
    let three = place(measured(&[1150, 1150, 1150], &[1.0, 9.0, 1.0]));
    assert!(three.stages().len() == 2 && three.stages().iter().all(|s| s.node != id(1)), "{:?}", three.explanation());
}
