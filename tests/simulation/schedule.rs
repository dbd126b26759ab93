//! What happens in a lifecycle, and when. All times are milliseconds since the start.
//!
//! A change of a strategy (a range, a weight, the order of fields) or another version of proptest turns every seed in
//! `main.regressions` into another schedule, without notice. Before such a change, write out as a test what must be kept:
//! undo the mend, and copy the schedule that proptest prints. After it, remove the seeds.

use proptest::{collection::vec, option, prelude::*};

#[derive(Clone, Debug)]
pub(crate) struct Schedule {
    pub(crate) plan: Plan,
    pub(crate) max_in_flight: Option<usize>,
    pub(crate) name_requests: bool,
    pub(crate) keep_listening: bool,
    /// When the stop is asked for, once or several times.
    pub(crate) shutdowns: Vec<u64>,
    pub(crate) requests: Vec<Request>,
    pub(crate) holds: Vec<Hold>,
    pub(crate) workers: Vec<Worker>,
    pub(crate) hooks: Vec<Step>,
    pub(crate) cleanup: Vec<Step>,
}

#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) grace_period: u64,
    pub(crate) drain_delay: Option<u64>,
    pub(crate) drain_timeout: Option<u64>,
    pub(crate) cleanup_timeout: Option<u64>,
}

#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) at: u64,
    /// How long the handler takes.
    pub(crate) handler: u64,
    /// Frames of the body, and the time before each.
    pub(crate) frames: usize,
    pub(crate) gap: u64,
    pub(crate) large: bool,
    pub(crate) end: End,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The client reads everything.
    Whole,
    /// The client disconnects this long after its request.
    Disconnect(u64),
    HandlerPanics,
    /// The body panics in place of its last frame.
    BodyPanics,
    /// The body ends with an error.
    BodyFails,
    /// The handler never ends.
    Never,
}

#[derive(Clone, Debug)]
pub(crate) struct Hold {
    pub(crate) at: u64,
    /// `None`: for ever.
    pub(crate) lasts: Option<u64>,
}

#[derive(Clone, Debug)]
pub(crate) enum Worker {
    /// Ends this long after draining has begun.
    AfterDraining(u64),
    /// Ends this long after nothing is in flight any more.
    AfterIdle(u64),
    /// Ends by itself.
    Early(u64),
    Panics(u64),
    Never,
}

#[derive(Clone, Debug)]
pub(crate) struct Step {
    pub(crate) timeout: u64,
    pub(crate) does: Does,
}

#[derive(Clone, Debug)]
pub(crate) enum Does {
    End(u64),
    Fail(u64),
    Panic(u64),
    Hang,
}

fn time() -> impl Strategy<Value = u64> {
    // Often on the same instants, where races are.
    prop_oneof![
        Just(0),
        Just(1000),
        (0_u64..40).prop_map(|tenths| tenths * 100),
        0_u64..4000
    ]
}

fn plans() -> impl Strategy<Value = Plan> {
    let share = || option::of(prop_oneof![Just(0), Just(1000), 0_u64..2500]);
    (
        prop_oneof![Just(30_000), 1_u64..9000],
        share(),
        share(),
        share(),
    )
        .prop_map(
            |(grace_period, drain_delay, drain_timeout, cleanup_timeout)| Plan {
                grace_period,
                drain_delay,
                drain_timeout,
                cleanup_timeout,
            },
        )
}

fn requests() -> impl Strategy<Value = Request> {
    let end = prop_oneof![
        6 => Just(End::Whole),
        1 => (0_u64..3000).prop_map(End::Disconnect),
        1 => Just(End::HandlerPanics),
        1 => Just(End::BodyPanics),
        1 => Just(End::BodyFails),
        1 => Just(End::Never),
    ];
    let gap = prop_oneof![Just(0), Just(500), 0_u64..1500];
    (time(), time(), 0_usize..4, gap, any::<bool>(), end).prop_map(
        |(at, handler, frames, gap, large, end)| Request {
            at,
            handler,
            frames,
            gap,
            large,
            end,
        },
    )
}

fn holds() -> impl Strategy<Value = Hold> {
    (time(), option::weighted(0.9, time())).prop_map(|(at, lasts)| Hold { at, lasts })
}

fn workers() -> impl Strategy<Value = Worker> {
    prop_oneof![
        time().prop_map(Worker::AfterDraining),
        time().prop_map(Worker::AfterIdle),
        time().prop_map(Worker::Early),
        time().prop_map(Worker::Panics),
        Just(Worker::Never),
    ]
}

fn steps() -> impl Strategy<Value = Step> {
    let does = prop_oneof![
        4 => time().prop_map(Does::End),
        1 => time().prop_map(Does::Fail),
        1 => time().prop_map(Does::Panic),
        1 => Just(Does::Hang),
    ];
    (time(), does).prop_map(|(timeout, does)| Step { timeout, does })
}

pub(crate) fn schedules() -> impl Strategy<Value = Schedule> {
    (
        plans(),
        option::weighted(0.3, 1_usize..4),
        any::<bool>(),
        any::<bool>(),
        vec(time(), 1..3),
        vec(requests(), 0..8),
        vec(holds(), 0..3),
        vec(workers(), 0..3),
        vec(steps(), 0..3),
        vec(steps(), 0..4),
    )
        .prop_map(
            |(
                plan,
                max_in_flight,
                name_requests,
                keep_listening,
                shutdowns,
                requests,
                holds,
                workers,
                hooks,
                cleanup,
            )| {
                Schedule {
                    plan,
                    max_in_flight,
                    name_requests,
                    keep_listening,
                    shutdowns,
                    requests,
                    holds,
                    workers,
                    hooks,
                    cleanup,
                }
            },
        )
}
