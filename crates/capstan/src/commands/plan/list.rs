//! What the built-in catalogue has: models, machines, and where their figures are from.
use anyhow::Result;
use capstan_planner::human_bytes;
use capstan_planner::machines::MACHINES;
use capstan_planner::models::{KnownModel, MODELS};
use serde_json::{Value, json};

use crate::view::{self, Table};

/// Shows both catalogues.
pub fn show(json: bool) -> Result<()> {
    if json {
        let models: Vec<Value> = MODELS.iter().map(model).collect();
        let machines: Vec<Value> = MACHINES.iter().map(machine).collect();
        return view::print_json(&json!({ "models": models, "machines": machines }));
    }
    let mut models = Table::new(&["MODEL", "LAYERS", "WEIGHTS", "ACTIVE", "USUAL", "SOURCE"], &[1, 2, 3]);
    for m in MODELS {
        let billion = |weights: u64| format!("{:.1} B", weights as f64 / 1e9);
        let (all, active) = (billion(m.shape.total_weights()), billion(m.shape.active_weights()));
        let usual = m.usual().name.to_owned();
        models.row(vec![m.name.into(), m.shape.n_layers.to_string(), all, active, usual, m.source.into()]);
    }
    view::print_line(models.render(""))?;
    let common: Vec<_> = capstan_planner::quant::COMMON.iter().map(|q| q.name).collect();
    view::print_line(format!("\nAny of them also as {}.\n", common.join(", ")))?;
    let mut machines = Table::new(&["MACHINE", "MAY USE", "READS", "F16", "SOURCE"], &[1, 2, 3]);
    for m in MACHINES {
        for variant in m.variants() {
            let reads = format!("{:.0} GB/s", m.bandwidth_gb_per_s * m.reached.bandwidth);
            let rate = format!("{:.1} TFLOPS", m.f16_tflops * m.reached.gemm);
            machines.row(vec![variant.name, human_bytes(variant.usable_bytes), reads, rate, m.source.into()]);
        }
    }
    view::print_line(machines.render(""))
}

fn model(m: &KnownModel) -> Value {
    let quantisations: Vec<Value> = m
        .quantisations()
        .map(|q| {
            let bytes = m.shape.profile(m.name, q).total_bytes;
            json!({ "name": q.name, "bytes": bytes, "measured": q.file_bytes.is_some(), "source": q.source })
        })
        .collect();
    json!({
        "name": m.name,
        "aliases": m.aliases,
        "architecture": m.shape.architecture,
        "layers": m.shape.n_layers,
        "weights": m.shape.total_weights(),
        "active_weights": m.shape.active_weights(),
        "context_train": m.shape.context_train,
        "source": m.source,
        "quantisations": quantisations,
    })
}

fn machine(m: &capstan_planner::machines::KnownMachine) -> Value {
    let variants: Vec<Value> =
        m.variants().map(|v| json!({ "name": v.name, "usable_bytes": v.usable_bytes, "rates": v.rates })).collect();
    json!({
        "name": m.name,
        "aliases": m.aliases,
        "bandwidth_gb_per_s": m.bandwidth_gb_per_s,
        "f16_tflops": m.f16_tflops,
        "source": m.source,
        "reached": { "bandwidth": m.reached.bandwidth, "gemm": m.reached.gemm, "source": m.reached.source },
        "variants": variants,
    })
}
