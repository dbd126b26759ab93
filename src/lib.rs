//! lib
#![cfg_attr(docsrs, feature(doc_cfg))]

mod builder;
mod connections;
mod drain;
mod events;
mod gate;
mod handle;
mod leaving;
mod middleware;
mod phase;
mod plan;
mod policy;
mod probes;
mod registry;
mod rejection;
mod report;
mod run;
#[cfg(feature = "signal")]
mod signals;
mod sync;
mod timeline;

pub use crate::{
    builder::GracefulBuilder,
    connections::GracefulIo,
    drain::Drain,
    handle::{Graceful, PhaseReached, Snapshot},
    middleware::{GracefulBody, GracefulFuture, GracefulLayer, GracefulService},
    phase::Phase,
    plan::{ConfigError, Misfit},
    probes::{Probe, ProbeBody, ProbeFuture},
    rejection::{Rejection, RejectionReason},
    report::{Outcome, Remaining, Report, Trigger},
    run::ServerOutput,
};

#[cfg(feature = "axum")]
pub use crate::connections::{GracefulListener, TrackedListener};
