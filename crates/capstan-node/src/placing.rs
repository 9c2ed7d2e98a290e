//! Where a model's layers go: the planner is asked with what is known of nodes, links and buffers now.
use std::sync::Arc;

use capstan_planner::{Placement, PlanError, PlanInput, PlanOptions, Sizes, plan};
use capstan_proto::manage::{LoadForecast, ManageError, NodeStatus};

use crate::buffers;
use crate::cutter::OpenModel;
use crate::deployments::Movable;
use crate::fleet::Fleet;
use crate::node::Shared;
use crate::scheduling::spares_per_stage;

/// A placement, and how fast it will be if that is known. Of a sparse model's weights none count.
pub(crate) async fn place(
    shared: &Arc<Shared>,
    model: &OpenModel,
    options: PlanOptions,
    sparse: bool,
) -> Result<(Placement, Option<LoadForecast>), ManageError> {
    place_on(shared, Fleet::of(shared), model, options, sparse).await
}

/// The best placement of a model that is served already, on nodes that have free what it holds there; none when there is
/// no better one to be found.
pub(crate) async fn again(shared: &Arc<Shared>, one: &Movable, fleet: Fleet) -> Option<Placement> {
    let options = PlanOptions {
        ctx: one.status.ctx,
        slots: one.status.slots,
        spares_per_stage: spares_per_stage(one.request.speculation.unwrap_or(true), one.model.rollback()),
        objective: one.request.objective.unwrap_or_default(),
        ubatch: crate::deployments::UBATCH,
        ..PlanOptions::default()
    };
    place_on(shared, fleet, &one.model, options, false).await.ok().map(|(placement, _)| placement)
}

/// Where layers would go if nothing else were loaded: for a model that is only fetched.
pub(crate) async fn place_idle(
    shared: &Arc<Shared>,
    model: &OpenModel,
    options: PlanOptions,
) -> Result<(Placement, Option<LoadForecast>), ManageError> {
    let nodes = shared.cluster_status().nodes;
    let used = |n: &NodeStatus| (n.id, n.memory_total_bytes.saturating_sub(n.memory_free_bytes));
    let fleet = Fleet::of(shared).with_free(&nodes.iter().map(used).collect::<Vec<_>>());
    place_on(shared, fleet, model, options, false).await
}

/// The same on nodes as they are given.
pub(crate) async fn place_on(
    shared: &Arc<Shared>,
    fleet: Fleet,
    model: &OpenModel,
    options: PlanOptions,
    sparse: bool,
) -> Result<(Placement, Option<LoadForecast>), ManageError> {
    let wanted = buffers::Wanted {
        ctx: options.ctx,
        slots: options.slots,
        spares_per_stage: options.spares_per_stage,
        ubatch: options.ubatch,
        rollback: model.rollback(),
    };
    let buffers = buffers::of(shared, model, wanted).await;
    let model = model.model.clone();
    // Trying every order of several nodes for a deep model takes a moment; the daemon goes on meanwhile.
    let planned = tokio::task::spawn_blocking(move || {
        let profile = model.profile();
        let (ctx, slots, ubatch) = (options.ctx, options.slots, options.ubatch);
        let mut sizes = Sizes { buffers, ..Sizes::of(&profile) };
        if sparse {
            // What is never read takes no memory; which weights are, nobody knows before.
            sizes.weight_bytes.fill(0);
            sizes.ends_bytes = 0;
        }
        let placement = plan(&PlanInput {
            nodes: fleet.nodes(&profile, options.objective, slots),
            links: fleet.links(),
            sizes: &sizes,
            window_problem: &|range| model.window_problem(range),
            split_problem: model.split_problem(),
            options,
        })?;
        let forecast = fleet.forecast(&profile, &placement, &sizes, (ctx, slots, ubatch));
        Ok((placement, forecast))
    });
    let planned = planned.await.map_err(|e| ManageError::new(500, format!("planning failed: {e}")))?;
    planned.map_err(|error: PlanError| {
        let status = match error {
            PlanError::Memory { .. } | PlanError::UnknownNode(_) | PlanError::NoNodes => 409,
            _ => 400,
        };
        ManageError::new(status, error.to_string())
    })
}
