//! Placements cover every layer once, keep to the windows and the memory, and are found whenever one exists.
use capstan_planner::{NodeResources, PlanError, PlanInput, PlanOptions, Sizes, plan};
use capstan_proto::{LayerRange, NodeId};
use proptest::prelude::*;

fn id(n: usize) -> NodeId {
    NodeId([n as u8 + 1; 32])
}

fn nodes(free: &[u64]) -> Vec<NodeResources> {
    free.iter()
        .enumerate()
        .map(|(i, &free)| NodeResources { id: id(i), name: format!("n{i}"), free_bytes: free << 20 })
        .collect()
}

fn sizes(layers: &[u64], ends: u64) -> Sizes {
    Sizes {
        weight_bytes: layers.iter().map(|mib| mib << 20).collect(),
        kv_bytes_per_token: vec![1024; layers.len()],
        state_bytes_per_sequence: vec![0; layers.len()],
        ends_bytes: ends << 20,
        n_embd: 64,
        n_vocab: 32,
    }
}

fn options(nodes: Vec<NodeId>) -> PlanOptions {
    PlanOptions { ctx: 64, slots: 1, ubatch: 32, nodes, layers: vec![] }
}

fn range(a: u32, b: u32) -> LayerRange {
    LayerRange::new(a, b).unwrap()
}

/// Whether any cut of the layers over these nodes, in this order, is allowed and fits.
fn brute(sizes: &Sizes, free: &[u64], ok: &dyn Fn(LayerRange) -> bool, from: u32) -> bool {
    let n = sizes.layers();
    let Some((&first, rest)) = free.split_first() else { return from == n };
    (from + 1..=n).any(|end| {
        let r = range(from, end);
        (r.count() == n || ok(r)) && sizes.need(r, 64, 1, 32).total() <= first << 20 && brute(sizes, rest, ok, end)
    })
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
    fn feasible_exactly_when_brute_force_says_so(
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
            nodes: nodes(&free), sizes: &sizes, window_problem: &problem, split_problem: None, options: options(wanted),
        };
        let fewest = if named {
            brute(&sizes, &free, &ok, 0).then_some(free.len())
        } else {
            (1..=free.len()).find(|&k| permutations(&free, k).iter().any(|p| brute(&sizes, p, &ok, 0)))
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
            }
            Err(error) => {
                prop_assert_eq!(fewest, None, "{}", error);
                prop_assert!(error.to_string().len() > 20);
            }
        }
    }
}

#[test]
fn layers_lie_in_proportion_to_free_memory() {
    let sizes = sizes(&[10; 30], 0);
    let input = PlanInput {
        nodes: nodes(&[300, 600, 900]),
        sizes: &sizes,
        window_problem: &|_| None,
        split_problem: None,
        options: options(vec![id(2), id(0), id(1)]),
    };
    let placement = plan(&input).unwrap();
    let counts: Vec<_> = placement.stages().iter().map(|s| s.layers.count()).collect();
    assert_eq!(placement.stages()[0].node, id(2));
    // The fixed cost of a process weighs more on the small node, so it gets a little less than its fifth.
    assert!(counts[0] >= 15 && counts[1] <= 5 && (9..=11).contains(&counts[2]), "{counts:?}");
}

#[test]
fn refusals_say_what_is_wrong() {
    let sizes = sizes(&[100; 6], 50);
    let base = |options: PlanOptions, split: Option<&str>| {
        plan(&PlanInput {
            nodes: nodes(&[400, 300]),
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
