//! Random workloads keep every rule, and a seed means the same twice.
use capstan_sim::workload;

#[test]
fn random_workloads_keep_the_rules() {
    for seed in 0..300 {
        if let Err((failure, _)) = workload::run(seed, false) {
            panic!(
                "seed {seed}: {failure}\nreplay: capstan-sim --scenario random --workloads 1 --seed {seed} --trace ''"
            );
        }
    }
}

#[test]
fn a_seed_replays() {
    for seed in [3, 14, 15] {
        assert_eq!(workload::run(seed, false).unwrap(), workload::run(seed, true).unwrap());
    }
}
