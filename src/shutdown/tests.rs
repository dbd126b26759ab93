//! The steps of a stop to the millisecond, by tokio's clock, with listeners and connections that are
//! entered by hand.

use std::{
    sync::Arc,
    task::{Context, Waker},
};

use tokio::time::{Duration, Instant, sleep_until};

use super::{
    Directive, Phase, Shared, Trigger,
    state::{ClosingStage, ServerEnd},
};
use crate::{
    connection::{
        state::{RegisteredWaker, WakerSlot},
        table::ConnectionEntry,
    },
    handle::{builder::GracefulBuilder, graceful::Graceful},
    report::Outcome,
};

const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// A stop that is looked at from when it is asked for.
struct Stop {
    graceful: Graceful,
    begun: Instant,
}

impl Stop {
    /// Of a service that has served.
    fn new(delay: u64, drain: u64, build: impl FnOnce(GracefulBuilder) -> GracefulBuilder) -> Self {
        let builder = Graceful::builder()
            .drain_delay(ms(delay))
            .drain_timeout(ms(drain));
        let graceful = build(builder).build().unwrap();
        graceful.shared().mark_served();
        let begun = Instant::now();
        Self { graceful, begun }
    }

    fn shared(&self) -> &Shared {
        self.graceful.shared()
    }

    fn connect(&self) -> Arc<ConnectionEntry<Shared>> {
        self.shared()
            .connections
            .insert(self.shared().clone(), None)
    }

    /// A connection that its server waits for.
    fn connect_and_read(&self) -> Arc<ConnectionEntry<Shared>> {
        let line = self.connect();
        let cx = Context::from_waker(Waker::noop());
        let mut stored = RegisteredWaker::default();
        line.state.enter(&mut stored, WakerSlot::Read, &cx);
        line
    }

    fn leave(&self, line: &ConnectionEntry<Shared>) {
        let shared = self.shared();
        if shared.connections.remove(line, || shared.phase()) {
            shared.notify();
        }
    }

    fn listen(&self) {
        self.shared().connections.listener_opened(false);
    }

    fn close_listener(&self) {
        self.shared().connections.listener_closed();
        self.shared().notify();
    }

    fn terminate(&mut self) {
        self.begun = Instant::now();
        self.shared().signal(Trigger::Terminate);
    }

    fn interrupt(&self) {
        self.shared().signal(Trigger::Interrupt);
    }

    fn phase(&self) -> Phase {
        self.graceful.phase()
    }

    fn closing_stage(&self) -> ClosingStage {
        *self.shared().closing_stages().borrow()
    }

    /// Until so many milliseconds after the stop was asked for.
    async fn at(&self, after: u64) {
        sleep_until(self.begun + ms(after)).await;
    }
}

fn as_it_is(builder: GracefulBuilder) -> GracefulBuilder {
    builder
}

#[tokio::test(start_paused = true)]
async fn a_signal_has_no_delay_before_anything_serves() {
    let never = Graceful::new();
    never.shared().signal(Trigger::Terminate);
    assert!(never.phase() > Phase::LameDuck);

    let serves: [fn(&Graceful); 3] = [
        |it| it.shared().server_began(),
        |it| it.shared().drain_began(),
        |it| drop(it.track(())),
    ];
    for serves in serves {
        let graceful = Graceful::new();
        serves(&graceful);
        graceful.shared().signal(Trigger::Terminate);
        assert_eq!(graceful.phase(), Phase::LameDuck);
    }
}

#[tokio::test(start_paused = true)]
async fn the_delay_goes_on_while_a_drain_waits_although_every_server_has_ended() {
    let mut stop = Stop::new(1000, 1000, as_it_is);
    stop.shared().server_began();
    for _ in 0..2 {
        stop.shared().drain_began();
    }
    stop.terminate();
    stop.shared().server_ended(&ServerEnd::Finished);
    assert_eq!(stop.phase(), Phase::LameDuck);
    stop.shared().drain_ended();
    assert_eq!(stop.phase(), Phase::LameDuck);
    stop.shared().drain_ended();
    assert_eq!(stop.phase(), Phase::Stopped);
}

#[tokio::test(start_paused = true)]
async fn a_sigint_ends_the_delay_once_the_listener_has_closed() {
    let mut stop = Stop::new(5000, 5000, |it| it.keep_listening(false));
    stop.listen();
    let hold = stop.graceful.hold("work");
    stop.terminate();
    stop.at(1000).await;
    assert_eq!(
        (stop.phase(), stop.closing_stage()),
        (Phase::LameDuck, ClosingStage::Open)
    );
    stop.interrupt();
    assert_eq!(stop.phase(), Phase::LameDuck);
    assert_eq!(stop.closing_stage(), ClosingStage::Listeners);
    stop.at(1050).await;
    assert_eq!(stop.phase(), Phase::LameDuck);
    stop.close_listener();
    stop.at(1055).await;
    assert_eq!(stop.phase(), Phase::Draining);
    assert_eq!(stop.closing_stage(), ClosingStage::Connections);
    drop(hold);
}

#[tokio::test(start_paused = true)]
async fn a_listener_that_does_not_close_is_waited_for_a_second() {
    let mut stop = Stop::new(0, 3000, as_it_is);
    stop.listen();
    stop.terminate();
    assert_eq!(stop.closing_stage(), ClosingStage::Listeners);
    stop.at(50).await;
    // However often it is looked at.
    stop.shared().notify();
    stop.at(998).await;
    assert_eq!(
        (stop.phase(), stop.closing_stage()),
        (Phase::Closing, ClosingStage::Listeners)
    );
    stop.at(1002).await;
    assert_eq!(stop.phase(), Phase::Stopped);
    assert_eq!(stop.closing_stage(), ClosingStage::Servers);
}

#[tokio::test(start_paused = true)]
async fn a_listener_is_not_waited_for_beyond_the_drain_deadline() {
    let mut stop = Stop::new(0, 1000, as_it_is);
    stop.listen();
    let hold = stop.graceful.hold("work");
    stop.terminate();
    stop.at(800).await;
    assert_eq!(stop.closing_stage(), ClosingStage::Open);
    stop.close_listener();
    stop.listen();
    stop.at(860).await;
    drop(hold);
    stop.at(870).await;
    assert_eq!(
        (stop.phase(), stop.closing_stage()),
        (Phase::Closing, ClosingStage::Listeners)
    );
    stop.at(1002).await;
    assert_eq!(stop.phase(), Phase::Stopped);

    let mut stop = Stop::new(0, 1000, as_it_is);
    stop.listen();
    let hold = stop.graceful.hold("work");
    let line = stop.connect();
    stop.at(1).await;
    stop.terminate();
    // The last call has come: 125 ms before the deadline.
    stop.at(990).await;
    assert_eq!(stop.phase(), Phase::Draining);
    assert_eq!(stop.closing_stage(), ClosingStage::Listeners);
    drop(hold);
    stop.at(998).await;
    assert_eq!(
        (stop.phase(), stop.closing_stage()),
        (Phase::Closing, ClosingStage::Listeners)
    );
    stop.at(1002).await;
    assert_eq!(stop.closing_stage(), ClosingStage::Connections);
    stop.leave(&line);

    let mut stop = Stop::new(0, 400, as_it_is);
    stop.listen();
    let hold = stop.graceful.hold("work");
    stop.terminate();
    // 30 ms after the last call.
    stop.at(380).await;
    drop(hold);
    stop.at(398).await;
    assert_eq!(
        (stop.phase(), stop.closing_stage()),
        (Phase::Closing, ClosingStage::Listeners)
    );
    stop.at(402).await;
    assert_eq!(stop.phase(), Phase::Stopped);

    // Nor once the rest is cut.
    let mut stop = Stop::new(0, 5000, as_it_is);
    stop.listen();
    let _hold = stop.graceful.hold("work");
    stop.terminate();
    stop.at(1000).await;
    stop.interrupt();
    assert_eq!(
        (stop.phase(), stop.closing_stage()),
        (Phase::Closing, ClosingStage::Connections)
    );
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_nobody_has_read_is_not_closed_at_once() {
    let mut stop = Stop::new(0, 3000, as_it_is);
    stop.listen();
    stop.close_listener();
    let line = stop.connect();
    stop.terminate();
    stop.at(998).await;
    assert_eq!(stop.closing_stage(), ClosingStage::Listeners);
    assert!(line.state.directive() < Directive::Close);
    stop.at(1002).await;
    assert_eq!(line.state.directive(), Directive::Close);
    // Not before a second after it was told to close.
    stop.at(1990).await;
    assert_eq!(line.state.directive(), Directive::Close);
    stop.at(2010).await;
    assert_eq!(line.state.directive(), Directive::Expire);
    stop.leave(&line);
    stop.at(2015).await;
    assert_eq!(stop.phase(), Phase::Stopped);
}

#[tokio::test(start_paused = true)]
async fn a_connection_expires_before_it_would_be_cut() {
    let mut stop = Stop::new(0, 1000, as_it_is);
    let line = stop.connect_and_read();
    stop.terminate();
    stop.at(900).await;
    assert_eq!(line.state.directive(), Directive::Close);
    stop.at(990).await;
    assert_eq!(
        line.state.directive(),
        Directive::Expire,
        "50 ms before it is cut"
    );
    stop.leave(&line);
}

#[tokio::test(start_paused = true)]
async fn connections_are_closed_when_nothing_has_been_heard_for_a_while() {
    // Since the stop was asked for.
    let mut stop = Stop::new(0, 1000, as_it_is);
    stop.listen();
    stop.close_listener();
    let line = stop.connect_and_read();
    stop.terminate();
    stop.at(23).await;
    assert_eq!(stop.closing_stage(), ClosingStage::Listeners);
    stop.at(27).await;
    assert_eq!(line.state.directive(), Directive::Close);

    // That was long ago, and so is the opening of the connection.
    let mut stop = Stop::new(500, 1000, as_it_is);
    stop.listen();
    stop.close_listener();
    let line = stop.connect_and_read();
    stop.terminate();
    stop.at(502).await;
    assert_eq!(line.state.directive(), Directive::Close);

    // Something is heard shortly before.
    let mut stop = Stop::new(500, 1000, as_it_is);
    stop.listen();
    stop.close_listener();
    let line = stop.connect_and_read();
    stop.terminate();
    stop.at(490).await;
    line.read_while_stopping(line.state.directive());
    stop.at(522).await;
    assert_eq!(stop.closing_stage(), ClosingStage::Listeners);
    stop.at(527).await;
    assert_eq!(line.state.directive(), Directive::Close);

    // And again and again.
    let mut stop = Stop::new(0, 1000, as_it_is);
    stop.listen();
    stop.close_listener();
    let line = stop.connect_and_read();
    stop.terminate();
    for after in (10..=140).step_by(10) {
        stop.at(after).await;
        assert_eq!(stop.closing_stage(), ClosingStage::Listeners);
        line.read_while_stopping(line.state.directive());
    }
    stop.at(148).await;
    line.read_while_stopping(line.state.directive());
    assert_eq!(stop.closing_stage(), ClosingStage::Listeners);
    stop.at(152).await;
    assert_eq!(line.state.directive(), Directive::Close);
}

#[tokio::test(start_paused = true)]
async fn a_connection_expires_a_second_after_it_was_told_to_close() {
    let mut stop = Stop::new(0, 1200, as_it_is);
    let line = stop.connect();
    stop.terminate();
    assert_eq!(line.state.directive(), Directive::Close);
    stop.at(500).await;
    stop.shared().notify();
    stop.at(998).await;
    assert_eq!(line.state.directive(), Directive::Close);
    stop.at(1002).await;
    assert_eq!(line.state.directive(), Directive::Expire);
    stop.at(1198).await;
    assert_eq!(line.state.directive(), Directive::Expire);
    stop.at(1202).await;
    assert_eq!(
        line.state.directive(),
        Directive::Cut,
        "the deadline is not slept over"
    );

    // Before it is cut in any case.
    let mut stop = Stop::new(0, 500, as_it_is);
    let line = stop.connect();
    stop.terminate();
    stop.at(448).await;
    assert_eq!(line.state.directive(), Directive::Close);
    stop.at(452).await;
    assert_eq!(line.state.directive(), Directive::Expire);
}

#[tokio::test(start_paused = true)]
async fn a_connection_expires_a_second_after_the_last_request_has_left() {
    let mut stop = Stop::new(0, 5000, |it| it.keep_listening(false));
    let hold = stop.graceful.hold("work");
    let line = stop.connect();
    stop.terminate();
    assert_eq!(line.state.directive(), Directive::Close);
    stop.at(2000).await;
    drop(hold);
    stop.at(2998).await;
    assert_eq!(line.state.directive(), Directive::Close);
    stop.at(3002).await;
    assert_eq!(line.state.directive(), Directive::Expire);
}

#[tokio::test(start_paused = true)]
async fn connections_look_again_every_second_after_the_first_has_expired() {
    let mut stop = Stop::new(0, 5000, as_it_is);
    let line = stop.connect();
    stop.terminate();
    stop.at(1500).await;
    assert_eq!(line.state.directive(), Directive::Expire);
    let mut reader = tokio_test::task::spawn(());
    let mut stored = RegisteredWaker::default();
    reader.enter(|cx, _| line.state.enter(&mut stored, WakerSlot::Read, cx));
    stop.at(1998).await;
    assert!(!reader.is_woken());
    stop.at(2002).await;
    assert!(reader.is_woken());
}

#[tokio::test(start_paused = true)]
async fn a_connection_expires_no_sooner_because_it_was_told_late() {
    let mut stop = Stop::new(0, 5000, as_it_is);
    stop.listen();
    stop.close_listener();
    let line = stop.connect();
    stop.terminate();
    stop.at(1990).await;
    assert_eq!(line.state.directive(), Directive::Close);
    stop.at(2010).await;
    assert_eq!(line.state.directive(), Directive::Expire);
}

#[tokio::test(start_paused = true)]
async fn a_sigint_while_a_listener_closes_has_the_connections_close_and_cuts_none() {
    let mut stop = Stop::new(0, 5000, as_it_is);
    stop.listen();
    let line = stop.connect();
    stop.terminate();
    assert_eq!(stop.closing_stage(), ClosingStage::Listeners);
    stop.interrupt();
    assert_eq!(stop.closing_stage(), ClosingStage::Connections);
    assert_eq!(line.state.directive(), Directive::Close);
    stop.at(200).await;
    assert_eq!(line.state.directive(), Directive::Close);
    stop.interrupt();
    assert_eq!(line.state.directive(), Directive::Cut);
    assert_eq!(stop.phase(), Phase::Closing);
    // Within the time for which what was cut is waited for.
    stop.at(350).await;
    stop.interrupt();
    assert_eq!(stop.phase(), Phase::Stopped);
    let report = stop.shared().report().unwrap();
    assert_eq!(report.outcome(), Outcome::Abandoned);
}

#[tokio::test(start_paused = true)]
async fn a_sigint_in_the_moment_in_which_the_last_work_ends_hurries_nothing_else() {
    let mut stop = Stop::new(0, 5000, as_it_is);
    stop.listen();
    let hold = stop.graceful.hold("work");
    let line = stop.connect();
    stop.terminate();
    stop.at(1000).await;
    // Nobody has looked yet.
    drop(hold);
    stop.interrupt();
    assert_eq!(
        (stop.phase(), stop.closing_stage()),
        (Phase::Closing, ClosingStage::Listeners)
    );
    assert_eq!(line.state.directive(), Directive::Leave);
}

#[tokio::test(start_paused = true)]
async fn servers_that_end_because_a_sigint_cut_the_wait_for_them_were_not_forced() {
    for is_hurried in [true, false] {
        let mut stop = Stop::new(0, 1000, as_it_is);
        stop.shared().server_began();
        stop.terminate();
        assert_eq!(stop.phase(), Phase::Closing);
        stop.at(500).await;
        if is_hurried {
            stop.interrupt();
        } else {
            stop.at(1002).await;
        }
        stop.shared().server_ended(&ServerEnd::Finished);
        let report = stop.shared().report().unwrap();
        let outcome = if is_hurried {
            Outcome::Clean
        } else {
            Outcome::Forced
        };
        assert_eq!(report.outcome(), outcome);
    }
}

#[tokio::test(start_paused = true)]
async fn a_service_that_has_stopped_is_not_kept_by_the_connections_it_has_cut() {
    let mut stop = Stop::new(0, 100, as_it_is);
    let line = stop.connect();
    stop.terminate();
    stop.at(1000).await;
    assert_eq!(stop.phase(), Phase::Stopped);
    stop.leave(&line);
    drop(line);
    let weak = stop.shared().downgrade();
    drop(stop);
    tokio::task::yield_now().await;
    assert!(weak.upgrade().is_none());
}

#[tokio::test(start_paused = true)]
async fn peers_are_asked_to_leave_a_little_before_the_end_of_the_delay() {
    for (delay, asked) in [(80, 70), (1000, 975)] {
        let mut stop = Stop::new(delay, 1000, as_it_is);
        let line = stop.connect();
        stop.terminate();
        stop.at(asked - 2).await;
        assert_eq!(line.state.directive(), Directive::Stopping);
        stop.at(asked + 2).await;
        assert_eq!(stop.phase(), Phase::LameDuck);
        assert_eq!(line.state.directive(), Directive::Leave);
    }
}

#[tokio::test(start_paused = true)]
async fn connections_are_told_to_close_a_little_before_the_drain_deadline() {
    for (drain, before) in [(1000, 125), (8000, 250)] {
        let mut stop = Stop::new(4000, drain, as_it_is);
        let hold = stop.graceful.hold("work");
        let line = stop.connect();
        stop.terminate();
        let last_call = 4000 + drain - before;
        stop.at(last_call - 2).await;
        assert_eq!(line.state.directive(), Directive::Leave);
        stop.at(last_call + 2).await;
        assert_eq!(stop.phase(), Phase::Draining);
        assert_eq!(line.state.directive(), Directive::Close);
        drop(hold);
    }
}

#[tokio::test(start_paused = true)]
async fn what_was_cut_takes_only_a_part_of_the_time_for_cleaning_up() {
    // The end of the plan is so long after the deadline.
    for (kept, grace, cleans_up, let_go) in [
        (800, 1862, true, 100),
        (800, 1862, false, 250),
        (40, 1076, true, 20),
    ] {
        let mut stop = Stop::new(0, 1000, |it| {
            it.cleanup_timeout(ms(kept)).grace_period(ms(grace))
        });
        if cleans_up {
            let endless = std::future::pending::<()>();
            stop.graceful.cleanup("step", ms(10), endless).unwrap();
        }
        let _line = stop.connect();
        stop.terminate();
        stop.graceful.stopped().await;
        let report = stop.shared().report().unwrap();
        let closed = report.time_in(Phase::Closing);
        let expected = ms(1000 + let_go);
        assert!(
            closed >= expected && closed <= expected + ms(3),
            "{closed:?}"
        );
    }
}

/// Anything else that was cut, or a server that does not end, is something that was lost.
#[tokio::test(start_paused = true)]
async fn a_sigint_that_cuts_the_wait_for_servers_does_not_hide_what_else_is_lost() {
    for what in ["a connection", "a hold", "a server"] {
        let mut stop = Stop::new(0, 5000, as_it_is);
        stop.shared().server_began();
        let line = (what == "a connection").then(|| stop.connect());
        stop.terminate();
        let hold = (what == "a hold").then(|| stop.graceful.hold("work"));
        stop.at(500).await;
        stop.interrupt();
        if let Some(line) = line {
            stop.leave(&line);
        }
        drop(hold);
        if what != "a server" {
            stop.shared().server_ended(&ServerEnd::Finished);
        }
        stop.at(1000).await;
        let report = stop.shared().report().unwrap();
        assert_eq!(report.outcome(), Outcome::Forced, "{what}");
        assert_eq!(report.remaining().servers, 1, "{what}");
    }
}

/// What the report makes of connections that were open at the cut.
#[tokio::test(start_paused = true)]
async fn a_connection_at_the_cut_loses_what_it_had_not_delivered() {
    use crate::{
        connection::table::{LINGERS, RESPONDED},
        sync::Ordering,
    };

    // The flags of a connection, whether bytes are left, and what is lost: connections, requests.
    let cases = [
        (0, 0, 1, 0),
        (0, 1, 1, 0),
        (RESPONDED, 0, 1, 0),
        (RESPONDED, 1, 1, 1),
        (LINGERS, 0, 0, 0),
        (LINGERS, 1, 1, 0),
        (LINGERS | RESPONDED, 0, 0, 0),
        (LINGERS | RESPONDED, 1, 1, 1),
    ];
    for (flags, undelivered, connections, requests) in cases {
        let mut stop = Stop::new(0, 500, as_it_is);
        let lines = [stop.connect(), stop.connect()];
        // In flight when the stop begins, and let go by their handlers.
        let pieces: Vec<_> = (0..3)
            .map(|_| stop.shared().admission().admit().unwrap().answered())
            .collect();
        stop.terminate();
        drop(pieces);
        for line in &lines {
            line.flags.set(flags);
            line.undelivered.store(undelivered, Ordering::Relaxed);
        }
        stop.at(1000).await;
        let report = stop.shared().report().unwrap();
        let what = format!("{flags} {undelivered}: {report}");
        assert_eq!(report.remaining().connections, 2 * connections, "{what}");
        assert_eq!(report.requests().cut, 2 * requests, "{what}");
        assert_eq!(report.requests().finished, 3 - 2 * requests, "{what}");
        let outcome = if connections == 0 {
            Outcome::Clean
        } else {
            Outcome::Forced
        };
        assert_eq!(report.outcome(), outcome, "{what}");
    }
}

#[tokio::test(start_paused = true)]
async fn pieces_of_responses_are_requests_cut_but_no_more_than_connections_were_open() {
    for (open, pieces, cut) in [(1, 0, 0), (1, 1, 1), (2, 1, 1), (1, 2, 1)] {
        let mut stop = Stop::new(0, 500, as_it_is);
        let _lines: Vec<_> = (0..open).map(|_| stop.connect()).collect();
        let tickets = [(); 3].map(|()| stop.shared().admission().admit().unwrap().answered());
        let _held: Vec<_> = (0..pieces).map(|_| tickets[0].piece()).collect();
        stop.terminate();
        drop(tickets);
        stop.at(1000).await;
        let report = stop.shared().report().unwrap();
        assert_eq!(report.requests().cut, cut, "{open} {pieces}: {report}");
    }
}

#[tokio::test(start_paused = true)]
async fn of_a_connection_that_its_server_has_let_go_no_piece_is_held() {
    use crate::{
        connection::table::{LINGERS, RESPONDED},
        sync::Ordering,
    };

    // With so many requests in flight when the stop begins.
    for (begun, cut) in [(3, 2), (1, 1)] {
        let mut stop = Stop::new(0, 500, as_it_is);
        let [_open, lingers] = [stop.connect(), stop.connect()];
        lingers.flags.set(LINGERS | RESPONDED);
        lingers.undelivered.store(1, Ordering::Relaxed);
        let admission = stop.shared().admission();
        let tickets: Vec<_> = (0..begun)
            .map(|_| admission.admit().unwrap().answered())
            .collect();
        let _held = [tickets[0].piece(), tickets[0].piece()];
        stop.terminate();
        drop(tickets);
        stop.at(1000).await;
        let report = stop.shared().report().unwrap();
        assert_eq!(report.requests().cut, cut, "{report}");
    }
}

/// Five requests, and then silence.
fn five_requests(stop: &Stop) {
    for _ in 0..5 {
        if stop.shared().evidence.request_arrived() {
            stop.shared().notify();
        }
    }
}

fn when_quiet(builder: GracefulBuilder) -> GracefulBuilder {
    builder.leave_when_quiet(ms(1000), ms(500))
}

#[tokio::test(start_paused = true)]
async fn a_rule_shortens_the_delay_after_sigint_too_and_a_further_sigint_all_of_it() {
    let stop = Stop::new(5000, 5000, |it| when_quiet(it.interrupt_delay(ms(4000))));
    stop.interrupt();
    stop.at(50).await;
    five_requests(&stop);
    stop.at(995).await;
    assert_eq!(stop.phase(), Phase::LameDuck);
    stop.at(1005).await;
    assert!(stop.phase() > Phase::LameDuck);

    let stop = Stop::new(5000, 5000, |it| when_quiet(it.interrupt_delay(ms(4000))));
    stop.interrupt();
    stop.at(200).await;
    five_requests(&stop);
    assert_eq!(stop.phase(), Phase::LameDuck);
    stop.interrupt();
    assert!(stop.phase() > Phase::LameDuck);
    stop.graceful.stopped().await;
    let report = stop.shared().report().unwrap();
    assert_eq!(report.left_early(), None);
}

/// `interrupt_delay` is the shorter one here, and no rule makes it longer.
#[tokio::test(start_paused = true)]
async fn a_rule_never_makes_a_delay_longer() {
    let stop = Stop::new(5000, 5000, |it| when_quiet(it.interrupt_delay(ms(300))));
    stop.interrupt();
    five_requests(&stop);
    stop.at(305).await;
    assert!(stop.phase() > Phase::LameDuck);
    stop.graceful.stopped().await;
    let report = stop.shared().report().unwrap();
    assert_eq!(report.left_early(), None);
}

/// As before the end of a whole delay: so that a peer on HTTP/2 is not refused before it was asked.
#[tokio::test(start_paused = true)]
async fn peers_are_asked_to_leave_before_a_phase_that_ends_early() {
    let mut stop = Stop::new(5000, 5000, |it| when_quiet(it.close_spread(ms(5000))));
    let line = stop.connect_and_read();
    stop.terminate();
    stop.at(50).await;
    five_requests(&stop);
    stop.at(970).await;
    assert_eq!(line.state.directive(), Directive::LeaveInSlot);
    stop.at(985).await;
    assert_eq!(line.state.directive(), Directive::Leave);
    assert_eq!(stop.phase(), Phase::LameDuck);
    stop.at(1005).await;
    assert!(stop.phase() > Phase::LameDuck);
    stop.leave(&line);
}
