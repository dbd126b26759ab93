//! The steps of a stop, checked to the millisecond by tokio's paused clock. Listeners and
//! connections are registered by hand.

#[cfg(all(feature = "axum", feature = "signal"))]
use std::{pin::Pin, sync::mpsc, thread};
use std::{
    sync::Arc,
    task::{Context, Waker},
};

use http::{Method, StatusCode};
#[cfg(all(feature = "axum", feature = "signal"))]
use tokio::io::{AsyncRead, ReadBuf};
use tokio::{
    sync::oneshot,
    time::{Duration, Instant, sleep_until},
};
use tokio_test::{assert_pending, task};

use super::{
    Shared,
    state::{Clock, ClosingStage, ServerEnd},
};
use crate::{
    connection::{
        descriptors::{Socket, SocketKind},
        directive::Directive,
        entry::ConnectionEntry,
        flags::{ACTIVE, CLOSE_NOTICED, HANDSHAKE, UPGRADES},
        outside::Window,
        stagger::Place,
        wakers::{RegisteredWaker, WakerSlot},
    },
    control::Subject,
    handle::{builder::GracefulBuilder, graceful::Graceful},
    phase::Phase,
    report::{Outcome, Trigger},
    sync::lock,
};

const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// A lifecycle, and when its stop began.
struct Stop {
    graceful: Graceful,
    begun: Instant,
}

impl Stop {
    /// Makes a service that has served. Times in milliseconds.
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

    /// Opens a connection that its server reads from.
    fn connect_and_read(&self) -> Arc<ConnectionEntry<Shared>> {
        let entry = self.connect();
        let cx = Context::from_waker(Waker::noop());
        let mut stored = RegisteredWaker::default();
        entry.state.enter(&mut stored, WakerSlot::Read, &cx);
        entry
    }

    fn leave(&self, entry: &ConnectionEntry<Shared>) {
        let shared = self.shared();
        if shared.connections.remove(entry, || shared.phase()) {
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

    /// Asserts that the connection is to be read once more, and to be closed after that.
    async fn assert_closed_after_one_more_read(&self, entry: &ConnectionEntry<Shared>) {
        assert_eq!(entry.state.directive(), Directive::Read);
        assert_eq!(self.closing_stage(), ClosingStage::Reads);
        entry.was_read_once_more();
        sleep_until(Instant::now() + ms(6)).await;
        assert_eq!(entry.state.directive(), Directive::Close);
    }

    /// Waits until `after` milliseconds after the stop began.
    async fn at(&self, after: u64) {
        sleep_until(self.begun + ms(after)).await;
    }
}

fn unchanged(builder: GracefulBuilder) -> GracefulBuilder {
    builder
}

fn runtime(paused: bool) -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(paused)
        .build()
        .unwrap()
}

/// Only the defaults, and where the next process has all listeners.
#[test]
fn a_shared_listener_shortens_the_delay_and_never_makes_it_longer() {
    let delay = |builder: GracefulBuilder, listeners: &[bool]| {
        let graceful = builder.build().unwrap();
        for is_shared in listeners {
            graceful.shared().connections.listener_opened(*is_shared);
        }
        graceful.shared().plan().drain_delay()
    };
    let default = Graceful::builder;
    assert_eq!(delay(default(), &[]), ms(5000));
    assert_eq!(delay(default(), &[true, true]), ms(500));
    assert_eq!(delay(default(), &[true, false]), ms(5000));
    assert_eq!(delay(default().drain_delay(ms(900)), &[true]), ms(900));
    // There the default is shorter than that of a shared listener.
    let short = || default().grace_period(ms(1200));
    assert!(delay(short(), &[]) < ms(500));
    assert_eq!(delay(short(), &[true]), delay(short(), &[]));
}

/// The listeners, those of them that have closed, and the connections that are left.
#[tokio::test(start_paused = true)]
async fn the_delay_ends_once_the_next_process_has_taken_over() {
    for (listeners, closed, connections, is_shared, expected) in [
        (0, 0, 0, true, Phase::LameDuck),
        (1, 0, 0, true, Phase::LameDuck),
        (1, 1, 1, true, Phase::LameDuck),
        (1, 1, 0, false, Phase::LameDuck),
        (1, 1, 0, true, Phase::Stopped),
    ] {
        let mut stop = Stop::new(400, 1000, |builder| builder.shared_listener(is_shared));
        for _ in 0..listeners {
            stop.listen();
        }
        let _connections: Vec<_> = (0..connections).map(|_| stop.connect()).collect();
        stop.terminate();
        for _ in 0..closed {
            stop.close_listener();
        }
        stop.at(200).await;
        let case = (listeners, closed, connections, is_shared);
        assert_eq!(stop.phase(), expected, "{case:?}");
    }
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
    let mut stop = Stop::new(1000, 1000, unchanged);
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
async fn the_delay_goes_on_until_the_last_of_two_servers_has_ended() {
    let mut stop = Stop::new(1000, 1000, unchanged);
    for _ in 0..2 {
        stop.shared().server_began();
    }
    stop.terminate();
    stop.shared().server_ended(&ServerEnd::Finished);
    assert_eq!(stop.phase(), Phase::LameDuck);
    stop.shared().server_ended(&ServerEnd::Finished);
    assert_eq!(stop.phase(), Phase::Stopped);
}

#[tokio::test(start_paused = true)]
async fn servers_and_drain_futures_that_have_ended_stay_in_the_number_so_far() {
    let stop = Stop::new(0, 1000, unchanged);
    for n in 1..=2 {
        stop.shared().server_began();
        stop.shared().server_ended(&ServerEnd::Dropped);
        stop.shared().drain_began();
        stop.shared().drain_ended();
        let servers = stop.shared().servers(&stop.shared().state());
        assert_eq!((servers.run, servers.drains), (n, n));
    }
    assert_eq!(stop.phase(), Phase::Serving);
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
async fn a_sigint_within_100_ms_of_the_last_one_is_the_same() {
    let mut stop = Stop::new(5000, 5000, unchanged);
    let _hold = stop.graceful.hold("work");
    stop.terminate();
    stop.at(10).await;
    stop.interrupt();
    assert_eq!(stop.phase(), Phase::Draining);
    stop.at(109).await;
    stop.interrupt();
    assert_eq!(stop.phase(), Phase::Draining);
    stop.at(110).await;
    stop.interrupt();
    assert_eq!(stop.phase(), Phase::Closing);
}

#[tokio::test(start_paused = true)]
async fn the_stop_waits_one_second_for_a_listener_that_does_not_close() {
    let mut stop = Stop::new(0, 3000, unchanged);
    stop.listen();
    stop.terminate();
    assert_eq!(stop.closing_stage(), ClosingStage::Listeners);
    stop.at(50).await;
    // A notification in between does not end the wait.
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
async fn draining_begins_at_most_a_second_late_where_a_listener_waits_for_descriptors() {
    let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let socket = Arc::new(Socket {
        kind: SocketKind::Tcp(tcp),
        is_passed: true,
    });
    let mut stop = Stop::new(1000, 10_000, |it| it.keep_listening(false));
    stop.listen();
    stop.shared().starved.add_waiting(&socket);
    stop.shared().starved.begin_round();
    let _hold = stop.graceful.hold("work");
    stop.terminate();
    stop.at(1999).await;
    assert_eq!(stop.phase(), Phase::LameDuck);
    stop.at(2001).await;
    assert_eq!(stop.phase(), Phase::Draining);
}

#[tokio::test(start_paused = true)]
async fn the_stop_does_not_wait_for_a_listener_beyond_the_drain_deadline() {
    let mut stop = Stop::new(0, 1000, unchanged);
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

    let mut stop = Stop::new(0, 1000, unchanged);
    stop.listen();
    let hold = stop.graceful.hold("work");
    let entry = stop.connect();
    stop.at(1).await;
    stop.terminate();
    // Idle connections are closed from 125 ms before the deadline on.
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
    stop.leave(&entry);

    let mut stop = Stop::new(0, 400, unchanged);
    stop.listen();
    let hold = stop.graceful.hold("work");
    stop.terminate();
    // The closing of idle connections begins 350 ms after the stop began.
    stop.at(380).await;
    drop(hold);
    stop.at(398).await;
    assert_eq!(
        (stop.phase(), stop.closing_stage()),
        (Phase::Closing, ClosingStage::Listeners)
    );
    stop.at(402).await;
    assert_eq!(stop.phase(), Phase::Stopped);

    // A listener is not waited for after a cut either.
    let mut stop = Stop::new(0, 5000, unchanged);
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
async fn a_connection_that_no_task_has_read_is_not_closed_at_once() {
    let mut stop = Stop::new(0, 3000, unchanged);
    stop.listen();
    stop.close_listener();
    let entry = stop.connect();
    stop.terminate();
    stop.at(998).await;
    assert_eq!(stop.closing_stage(), ClosingStage::Listeners);
    assert!(entry.state.directive() < Directive::Close);
    stop.at(1002).await;
    assert_eq!(entry.state.directive(), Directive::Close);
    // It expires no earlier than a second after it was told to close.
    stop.at(1990).await;
    assert_eq!(entry.state.directive(), Directive::Close);
    stop.at(2010).await;
    assert_eq!(entry.state.directive(), Directive::Expire);
    stop.leave(&entry);
    stop.at(2015).await;
    assert_eq!(stop.phase(), Phase::Stopped);
}

#[tokio::test(start_paused = true)]
async fn a_connection_expires_before_it_would_be_cut() {
    let mut stop = Stop::new(0, 1000, unchanged);
    let entry = stop.connect_and_read();
    stop.terminate();
    stop.at(900).await;
    assert_eq!(entry.state.directive(), Directive::Close);
    stop.at(990).await;
    assert_eq!(
        entry.state.directive(),
        Directive::Expire,
        "50 ms before it is cut"
    );
    stop.leave(&entry);
}

#[tokio::test(start_paused = true)]
async fn connections_are_closed_after_25_ms_of_silence() {
    // The wait begins when the stop begins.
    let mut stop = Stop::new(0, 1000, unchanged);
    stop.listen();
    stop.close_listener();
    let entry = stop.connect_and_read();
    stop.terminate();
    stop.at(23).await;
    assert_eq!(stop.closing_stage(), ClosingStage::Listeners);
    stop.at(27).await;
    stop.assert_closed_after_one_more_read(&entry).await;

    // At the end of the delay the stop began long ago, and so did the connection.
    let mut stop = Stop::new(500, 1000, unchanged);
    stop.listen();
    stop.close_listener();
    let entry = stop.connect_and_read();
    stop.terminate();
    stop.at(502).await;
    stop.assert_closed_after_one_more_read(&entry).await;

    // Something is read shortly before the end of the delay.
    let mut stop = Stop::new(500, 1000, unchanged);
    stop.listen();
    stop.close_listener();
    let entry = stop.connect_and_read();
    stop.terminate();
    stop.at(490).await;
    entry.read_while_stopping(entry.state.directive());
    stop.at(522).await;
    assert_eq!(stop.closing_stage(), ClosingStage::Listeners);
    stop.at(527).await;
    stop.assert_closed_after_one_more_read(&entry).await;

    // Something is read again and again: the wait is limited.
    let mut stop = Stop::new(0, 1000, unchanged);
    stop.listen();
    stop.close_listener();
    let entry = stop.connect_and_read();
    stop.terminate();
    for after in (10..=140).step_by(10) {
        stop.at(after).await;
        assert_eq!(stop.closing_stage(), ClosingStage::Listeners);
        entry.read_while_stopping(entry.state.directive());
    }
    stop.at(148).await;
    entry.read_while_stopping(entry.state.directive());
    assert_eq!(stop.closing_stage(), ClosingStage::Listeners);
    stop.at(152).await;
    stop.assert_closed_after_one_more_read(&entry).await;
}

#[tokio::test(start_paused = true)]
async fn a_server_is_told_to_close_when_its_idle_connections_have_been_read_once_more() {
    let mut stop = Stop::new(0, 3000, unchanged);
    stop.listen();
    stop.close_listener();
    let idle = stop.connect_and_read();
    let busy = stop.connect_and_read();
    // The handler of one connection runs, so it may not be read.
    let hold = stop.graceful.hold("work");
    stop.terminate();
    stop.at(2790).await;
    idle.was_read_once_more();
    stop.at(2830).await;
    assert_eq!(idle.state.directive(), Directive::Read);
    stop.at(2860).await;
    assert_eq!(idle.state.directive(), Directive::Close);
    stop.leave(&idle);
    drop(hold);
    stop.leave(&busy);

    // A connection that is never read again is waited for a quarter of a second.
    let mut stop = Stop::new(0, 3000, unchanged);
    stop.listen();
    stop.close_listener();
    let idle = stop.connect_and_read();
    stop.terminate();
    stop.at(272).await;
    assert_eq!(stop.closing_stage(), ClosingStage::Reads);
    stop.at(280).await;
    assert_eq!(idle.state.directive(), Directive::Close);
    stop.leave(&idle);
}

#[tokio::test(start_paused = true)]
async fn connections_that_are_read_once_more_one_after_another_are_waited_for_one_second() {
    let mut stop = Stop::new(0, 5000, unchanged);
    stop.listen();
    stop.close_listener();
    let entries = [(); 10].map(|()| stop.connect_and_read());
    stop.terminate();
    stop.at(30).await;
    for (n, entry) in (0..9).zip(&entries) {
        assert_eq!(stop.closing_stage(), ClosingStage::Reads);
        entry.was_read_once_more();
        stop.at(30 + 110 * (n + 1)).await;
    }
    // Read less than 250 ms ago, and the last one is left.
    stop.at(1021).await;
    assert_eq!(stop.closing_stage(), ClosingStage::Reads);
    stop.at(1035).await;
    assert_eq!(stop.closing_stage(), ClosingStage::Connections);
}

#[tokio::test(start_paused = true)]
async fn connections_are_not_read_once_more_after_the_drain_deadline() {
    let mut stop = Stop::new(0, 1000, unchanged);
    stop.listen();
    stop.close_listener();
    let entry = stop.connect_and_read();
    let hold = stop.graceful.hold("work");
    stop.terminate();
    stop.at(915).await;
    assert_eq!(entry.state.directive(), Directive::Read);
    // With nothing in flight it has 250 ms.
    drop(hold);
    stop.at(995).await;
    assert_eq!(entry.state.directive(), Directive::Read);
    stop.at(1005).await;
    assert_eq!(entry.state.directive(), Directive::Close);
}

#[tokio::test(start_paused = true)]
async fn the_first_check_for_the_read_comes_after_1_ms_and_the_others_every_5_ms() {
    let mut stop = Stop::new(0, 1000, unchanged);
    stop.listen();
    stop.close_listener();
    let entry = stop.connect_and_read();
    stop.terminate();
    stop.at(24).await;
    assert_eq!(stop.closing_stage(), ClosingStage::Listeners);
    stop.at(25).await;
    for after in [1, 5, 5] {
        let now = Instant::now();
        let next = stop.shared().step(|_, _| ()).unwrap();
        assert_eq!(entry.state.directive(), Directive::Read);
        assert_eq!(next - now, ms(after));
    }
    stop.leave(&entry);
}

/// A service with a connection whose handshake runs.
fn stop_in_handshake(drain: u64) -> (Stop, Arc<ConnectionEntry<Shared>>) {
    let stop = Stop::new(0, drain, unchanged);
    stop.listen();
    stop.close_listener();
    let entry = stop.connect_and_read();
    entry.flags.set(HANDSHAKE);
    entry.sniffer.note(b"\x16\x03\x01");
    (stop, entry)
}

#[tokio::test(start_paused = true)]
async fn a_handshake_is_waited_for_one_second() {
    let (mut stop, entry) = stop_in_handshake(5000);
    stop.terminate();
    stop.at(998).await;
    assert_eq!(stop.closing_stage(), ClosingStage::Listeners);
    stop.at(1100).await;
    assert_eq!(entry.state.directive(), Directive::Close);
}

#[tokio::test(start_paused = true)]
async fn a_handshake_is_not_waited_for_beyond_the_drain_deadline() {
    let (mut stop, entry) = stop_in_handshake(400);
    let hold = stop.graceful.hold("work");
    stop.terminate();
    // The closing of idle connections begins 350 ms after the stop began.
    stop.at(380).await;
    drop(hold);
    stop.at(395).await;
    assert_eq!(stop.closing_stage(), ClosingStage::Listeners);
    stop.at(405).await;
    assert_eq!(entry.state.directive(), Directive::Close);
}

#[tokio::test(start_paused = true)]
async fn the_end_of_a_handshake_is_noticed_within_5_ms() {
    let (mut stop, entry) = stop_in_handshake(5000);
    stop.terminate();
    stop.at(500).await;
    entry.flags.take(HANDSHAKE);
    entry.flags.set(ACTIVE);
    stop.at(520).await;
    assert_eq!(stop.closing_stage(), ClosingStage::Listeners);
    stop.at(540).await;
    assert_eq!(stop.closing_stage(), ClosingStage::Reads);
    stop.assert_closed_after_one_more_read(&entry).await;
}

#[tokio::test(start_paused = true)]
async fn the_first_request_may_come_30_ms_after_a_handshake() {
    let (mut stop, entry) = stop_in_handshake(5000);
    stop.terminate();
    stop.at(500).await;
    stop.shared().change(|_, _| ());
    entry.flags.take(HANDSHAKE);
    entry.flags.set(ACTIVE);
    stop.at(510).await;
    // A part of the first request. The rest is not waited for any longer.
    entry.flags.set(ACTIVE);
    stop.shared().change(|_, _| ());
    stop.at(529).await;
    assert_eq!(stop.closing_stage(), ClosingStage::Listeners);
    stop.at(532).await;
    stop.assert_closed_after_one_more_read(&entry).await;
}

#[tokio::test(start_paused = true)]
async fn a_short_handshake_shortens_no_other_wait() {
    let (mut stop, entry) = stop_in_handshake(5000);
    stop.terminate();
    stop.at(10).await;
    entry.flags.take(HANDSHAKE);
    for after in (20..=140).step_by(20) {
        entry.flags.set(ACTIVE);
        stop.shared().change(|_, _| ());
        stop.at(after).await;
        assert_eq!(stop.closing_stage(), ClosingStage::Listeners);
    }
    entry.flags.set(ACTIVE);
    stop.shared().change(|_, _| ());
    stop.at(149).await;
    assert_eq!(stop.closing_stage(), ClosingStage::Listeners);
    stop.at(152).await;
    stop.assert_closed_after_one_more_read(&entry).await;
}

#[tokio::test(start_paused = true)]
async fn a_connection_expires_a_second_after_it_was_told_to_close() {
    let mut stop = Stop::new(0, 1200, unchanged);
    let entry = stop.connect();
    stop.terminate();
    assert_eq!(entry.state.directive(), Directive::Close);
    stop.at(500).await;
    stop.shared().notify();
    stop.at(998).await;
    assert_eq!(entry.state.directive(), Directive::Close);
    stop.at(1002).await;
    assert_eq!(entry.state.directive(), Directive::Expire);
    stop.at(1198).await;
    assert_eq!(entry.state.directive(), Directive::Expire);
    stop.at(1202).await;
    assert_eq!(
        entry.state.directive(),
        Directive::Cut,
        "the cut comes at the deadline"
    );

    // It expires before it is cut, even if less than a second has passed.
    let mut stop = Stop::new(0, 500, unchanged);
    let entry = stop.connect();
    stop.terminate();
    stop.at(448).await;
    assert_eq!(entry.state.directive(), Directive::Close);
    stop.at(452).await;
    assert_eq!(entry.state.directive(), Directive::Expire);
}

#[tokio::test(start_paused = true)]
async fn a_connection_expires_a_second_after_the_last_request_has_left() {
    let mut stop = Stop::new(0, 5000, |it| it.keep_listening(false));
    let hold = stop.graceful.hold("work");
    let entry = stop.connect();
    stop.terminate();
    assert_eq!(entry.state.directive(), Directive::Close);
    stop.at(2000).await;
    drop(hold);
    stop.at(2998).await;
    assert_eq!(entry.state.directive(), Directive::Close);
    stop.at(3002).await;
    assert_eq!(entry.state.directive(), Directive::Expire);
}

#[tokio::test(start_paused = true)]
async fn connections_are_woken_every_second_after_the_first_has_expired() {
    let mut stop = Stop::new(0, 5000, unchanged);
    let entry = stop.connect();
    stop.terminate();
    stop.at(1500).await;
    assert_eq!(entry.state.directive(), Directive::Expire);
    let mut reader = tokio_test::task::spawn(());
    let mut stored = RegisteredWaker::default();
    reader.enter(|cx, _| entry.state.enter(&mut stored, WakerSlot::Read, cx));
    stop.at(1998).await;
    assert!(!reader.is_woken());
    stop.at(2002).await;
    assert!(reader.is_woken());

    // Once, however often the stop is checked.
    reader.enter(|cx, _| entry.state.enter(&mut stored, WakerSlot::Read, cx));
    stop.shared().change(|_, _| ());
    stop.at(2998).await;
    assert!(!reader.is_woken());
    stop.at(3002).await;
    assert!(reader.is_woken());
}

#[tokio::test(start_paused = true)]
async fn connections_are_woken_before_the_cut_if_the_last_expiry_is_less_than_a_second_ago() {
    let mut stop = Stop::new(0, 1500, unchanged);
    let entry = stop.connect();
    stop.terminate();
    stop.at(1200).await;
    assert_eq!(entry.state.directive(), Directive::Expire);
    let mut reader = tokio_test::task::spawn(());
    let mut stored = RegisteredWaker::default();
    reader.enter(|cx, _| entry.state.enter(&mut stored, WakerSlot::Read, cx));
    stop.at(1448).await;
    assert!(!reader.is_woken());
    stop.at(1452).await;
    assert!(reader.is_woken());
    assert_eq!(entry.state.directive(), Directive::Expire);
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_is_told_to_close_late_expires_a_second_later() {
    let mut stop = Stop::new(0, 5000, unchanged);
    stop.listen();
    stop.close_listener();
    let entry = stop.connect();
    stop.terminate();
    stop.at(1990).await;
    assert_eq!(entry.state.directive(), Directive::Close);
    stop.at(2010).await;
    assert_eq!(entry.state.directive(), Directive::Expire);
}

#[tokio::test(start_paused = true)]
async fn a_sigint_while_a_listener_closes_closes_the_connections_and_cuts_none() {
    let mut stop = Stop::new(0, 5000, unchanged);
    stop.listen();
    let entry = stop.connect();
    stop.terminate();
    assert_eq!(stop.closing_stage(), ClosingStage::Listeners);
    stop.interrupt();
    assert_eq!(stop.closing_stage(), ClosingStage::Connections);
    assert_eq!(entry.state.directive(), Directive::Close);
    stop.at(200).await;
    assert_eq!(entry.state.directive(), Directive::Close);
    stop.interrupt();
    assert_eq!(entry.state.directive(), Directive::Cut);
    assert_eq!(stop.phase(), Phase::Closing);
    // The service is still waiting for what was cut.
    stop.at(350).await;
    stop.interrupt();
    assert_eq!(stop.phase(), Phase::Stopped);
    let report = stop.shared().report().unwrap();
    assert_eq!(report.outcome(), Outcome::Abandoned);
}

#[tokio::test(start_paused = true)]
async fn a_sigint_at_the_moment_the_last_work_ends_skips_no_later_step() {
    let mut stop = Stop::new(0, 5000, unchanged);
    stop.listen();
    let hold = stop.graceful.hold("work");
    let entry = stop.connect();
    stop.terminate();
    stop.at(1000).await;
    // The timeline has not checked yet.
    drop(hold);
    stop.interrupt();
    assert_eq!(
        (stop.phase(), stop.closing_stage()),
        (Phase::Closing, ClosingStage::Listeners)
    );
    assert_eq!(entry.state.directive(), Directive::Leave);
}

/// The cut may be what ends them. What it took from them is counted by itself.
#[tokio::test(start_paused = true)]
async fn servers_that_end_after_the_cut_are_not_given_up() {
    for is_interrupted in [true, false] {
        let mut stop = Stop::new(0, 1000, unchanged);
        stop.shared().server_began();
        stop.terminate();
        assert_eq!(stop.phase(), Phase::Closing);
        stop.at(500).await;
        if is_interrupted {
            stop.interrupt();
        } else {
            stop.at(1002).await;
        }
        stop.shared().server_ended(&ServerEnd::Finished);
        let report = stop.shared().report().unwrap();
        assert_eq!(report.outcome(), Outcome::Clean);
    }
}

#[tokio::test(start_paused = true)]
async fn cut_connections_do_not_keep_a_stopped_lifecycle_alive() {
    let mut stop = Stop::new(0, 100, unchanged);
    let entry = stop.connect();
    stop.terminate();
    stop.at(1000).await;
    assert_eq!(stop.phase(), Phase::Stopped);
    stop.leave(&entry);
    drop(entry);
    let weak = Arc::downgrade(stop.shared());
    drop(stop);
    tokio::task::yield_now().await;
    assert!(weak.upgrade().is_none());
}

#[tokio::test(start_paused = true)]
async fn peers_are_asked_to_leave_shortly_before_the_end_of_the_delay() {
    for (delay, asked) in [(80, 70), (1000, 975)] {
        let mut stop = Stop::new(delay, 1000, unchanged);
        let entry = stop.connect();
        stop.terminate();
        stop.at(asked - 2).await;
        assert_eq!(entry.state.directive(), Directive::Stopping);
        stop.at(asked + 2).await;
        assert_eq!(stop.phase(), Phase::LameDuck);
        assert_eq!(entry.state.directive(), Directive::Leave);
    }
}

#[tokio::test(start_paused = true)]
async fn connections_are_told_to_close_shortly_before_the_drain_deadline() {
    for (drain, before) in [(1000, 125), (8000, 250)] {
        let mut stop = Stop::new(4000, drain, unchanged);
        let hold = stop.graceful.hold("work");
        let entry = stop.connect();
        stop.terminate();
        let close_idle_at = 4000 + drain - before;
        stop.at(close_idle_at - 2).await;
        assert_eq!(entry.state.directive(), Directive::Leave);
        stop.at(close_idle_at + 2).await;
        assert_eq!(stop.phase(), Phase::Draining);
        assert_eq!(entry.state.directive(), Directive::Close);
        drop(hold);
    }
}

#[tokio::test(start_paused = true)]
async fn waiting_for_cut_connections_takes_only_a_part_of_the_cleanup_time() {
    // Times in milliseconds: from the drain deadline to the end of the plan, and the grace period.
    // Then whether there is a cleanup step, and how long the cut connection is waited for.
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
        let _entry = stop.connect();
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

/// A connection or hold that was cut, or a server that does not end, counts as lost.
#[tokio::test(start_paused = true)]
async fn a_sigint_that_ends_the_wait_for_servers_hides_no_other_loss() {
    for what in ["a connection", "a hold", "a server"] {
        let mut stop = Stop::new(0, 5000, unchanged);
        stop.shared().server_began();
        let entry = (what == "a connection").then(|| stop.connect());
        stop.terminate();
        let hold = (what == "a hold").then(|| stop.graceful.hold("work"));
        stop.at(500).await;
        stop.interrupt();
        if let Some(entry) = entry {
            stop.leave(&entry);
        }
        drop(hold);
        if what != "a server" {
            stop.shared().server_ended(&ServerEnd::Finished);
        }
        stop.at(1000).await;
        let report = stop.shared().report().unwrap();
        assert_eq!(report.outcome(), Outcome::Forced, "{what}");
        let servers = usize::from(what == "a server");
        assert_eq!(report.remaining().servers, servers, "{what}");
    }
}

/// How the report counts connections that were open at the cut.
#[tokio::test(start_paused = true)]
async fn a_connection_that_is_cut_loses_its_undelivered_bytes() {
    use crate::{
        connection::flags::{LINGERS, RESPONDED},
        sync::Ordering,
    };

    // The flags of a connection, its undelivered bytes, and the expected loss: connections,
    // requests.
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
        let mut stop = Stop::new(0, 500, unchanged);
        let entries = [stop.connect(), stop.connect()];
        // Requests in flight when the stop begins, whose handlers finish.
        let pieces: Vec<_> = (0..3)
            .map(|_| stop.shared().admission().admit().unwrap().answered())
            .collect();
        stop.terminate();
        drop(pieces);
        for entry in &entries {
            entry.flags.set(flags);
            entry.undelivered.store(undelivered, Ordering::Relaxed);
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

/// The step is taken, and the update that instructs the connections is not published yet.
#[tokio::test(start_paused = true)]
async fn a_connection_that_comes_before_the_cut_is_published_is_cut_and_counted() {
    let mut stop = Stop::new(0, 500, unchanged);
    let hold = stop.graceful.hold("work");
    stop.terminate();
    stop.at(100).await;
    assert_eq!(stop.phase(), Phase::Draining);
    let shared = Arc::clone(stop.shared());
    {
        let mut state = shared.state();
        let deadline = state.shutdown.as_ref().unwrap().drain_until;
        shared.settle(&mut state, deadline);
        assert!(state.shutdown.as_ref().unwrap().cut.is_some());
    }
    let late = stop.connect();
    assert_eq!(late.state.directive(), Directive::Cut);
    stop.leave(&late);
    drop(stop.graceful.track(()));
    drop(hold);
    stop.at(1000).await;
    let remaining = stop.shared().report().unwrap().remaining();
    assert_eq!((remaining.connections, remaining.queued), (0, 1));
}

/// Its client has not taken what was sent of the response when the connection is cut.
#[tokio::test(start_paused = true)]
async fn a_request_whose_response_has_failed_is_not_counted_as_cut_too() {
    use crate::{
        connection::flags::{LINGERS, RESPONDED},
        sync::Ordering,
    };

    let mut stop = Stop::new(0, 500, unchanged);
    let lingers = stop.connect();
    let permit = stop.shared().admission().admit().unwrap().answered();
    stop.terminate();
    permit.fail();
    lingers.flags.set(LINGERS | RESPONDED);
    lingers.undelivered.store(1, Ordering::Relaxed);
    stop.at(1000).await;
    let report = stop.shared().report().unwrap();
    assert_eq!(report.remaining().connections, 1, "{report}");
    let requests = report.requests();
    assert_eq!(requests.dropped, 1, "{report}");
    assert_eq!(requests.cut, 0, "{report}");
    assert_eq!(requests.finished, 0, "{report}");
}

#[tokio::test(start_paused = true)]
async fn pieces_of_responses_count_as_cut_requests_at_most_once_per_open_connection() {
    for (open, pieces, cut) in [(1, 0, 0), (1, 1, 1), (2, 1, 1), (1, 2, 1)] {
        let mut stop = Stop::new(0, 500, unchanged);
        let _entries: Vec<_> = (0..open).map(|_| stop.connect()).collect();
        let permits = [(); 3].map(|()| stop.shared().admission().admit().unwrap().answered());
        let _held: Vec<_> = (0..pieces).map(|_| permits[0].piece()).collect();
        stop.terminate();
        drop(permits);
        stop.at(1000).await;
        let report = stop.shared().report().unwrap();
        assert_eq!(report.requests().cut, cut, "{open} {pieces}: {report}");
    }
}

#[cfg(all(feature = "axum", feature = "signal"))]
#[tokio::test(start_paused = true)]
async fn unsent_responses_count_in_addition_to_the_requests_in_flight() {
    let mut stop = Stop::new(0, 500, unchanged);
    let entry = stop.connect();
    let permits = [(); 4].map(|()| stop.shared().admission().admit().unwrap().answered());
    stop.terminate();
    let [one, other, ..] = permits;
    for permit in [one, other] {
        entry.state.stream_began();
        entry.state.response_is_held();
        drop(permit);
    }
    stop.at(1000).await;
    let report = stop.shared().report().unwrap();
    assert_eq!(report.requests().cut, 4, "{report}");
    assert_eq!(report.requests().finished, 0, "{report}");
}

#[tokio::test(start_paused = true)]
async fn a_lingering_connection_counts_in_addition_to_the_pieces_that_servers_hold() {
    use crate::{
        connection::flags::{LINGERS, RESPONDED},
        sync::Ordering,
    };

    // The number of requests in flight when the stop begins, and the number cut.
    for (begun, cut) in [(3, 2), (1, 1)] {
        let mut stop = Stop::new(0, 500, unchanged);
        let [_open, lingers] = [stop.connect(), stop.connect()];
        lingers.flags.set(LINGERS | RESPONDED);
        lingers.undelivered.store(1, Ordering::Relaxed);
        let admission = stop.shared().admission();
        let permits: Vec<_> = (0..begun)
            .map(|_| admission.admit().unwrap().answered())
            .collect();
        let _held = [permits[0].piece(), permits[0].piece()];
        stop.terminate();
        drop(permits);
        stop.at(1000).await;
        let report = stop.shared().report().unwrap();
        assert_eq!(report.requests().cut, cut, "{report}");
    }
}

/// Records five requests. Silence follows.
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
async fn a_rule_shortens_the_delay_of_sigint_and_a_further_sigint_ends_it_at_once() {
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

/// Here `interrupt_delay` is shorter than the rule's minimum.
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

/// As at the end of a full delay, an HTTP/2 peer is asked to leave before requests are rejected.
#[tokio::test(start_paused = true)]
async fn peers_are_asked_to_leave_before_a_phase_that_ends_early() {
    let mut stop = Stop::new(5000, 5000, when_quiet);
    let entry = stop.connect_and_read();
    stop.terminate();
    stop.at(50).await;
    five_requests(&stop);
    stop.at(970).await;
    assert_eq!(entry.state.directive(), Directive::Stopping);
    stop.at(985).await;
    assert_eq!(entry.state.directive(), Directive::Leave);
    assert_eq!(stop.phase(), Phase::LameDuck);
    stop.at(1005).await;
    assert!(stop.phase() > Phase::LameDuck);
    stop.leave(&entry);
}

/// The clients that have not been asked to leave yet would otherwise all be asked at once.
#[tokio::test(start_paused = true)]
async fn a_phase_does_not_end_before_its_spread() {
    let mut stop = Stop::new(5000, 5000, |it| when_quiet(it.close_spread(ms(3000))));
    let entry = stop.connect_and_read();
    stop.terminate();
    stop.at(50).await;
    five_requests(&stop);
    stop.at(2990).await;
    assert_eq!(entry.state.directive(), Directive::LeaveInSlot);
    assert_eq!(stop.phase(), Phase::LameDuck);
    stop.at(3005).await;
    assert!(stop.phase() > Phase::LameDuck);
    stop.leave(&entry);
}

#[tokio::test(start_paused = true)]
async fn a_sigint_ends_the_wait_for_the_connections_of_a_shared_listener() {
    let mut stop = Stop::new(300, 5000, |it| it.shared_listener(true));
    stop.listen();
    let entry = stop.connect_and_read();
    stop.terminate();
    stop.close_listener();
    stop.at(400).await;
    // The delay is over, and the task of the connection may not have noticed that it is to close.
    assert_eq!(stop.phase(), Phase::LameDuck);
    stop.interrupt();
    assert!(stop.phase() > Phase::LameDuck);
    stop.leave(&entry);
}

#[tokio::test(start_paused = true)]
async fn the_connections_of_a_shared_listener_that_have_noticed_the_close_are_not_waited_for() {
    let mut stop = Stop::new(300, 5000, |it| it.shared_listener(true));
    stop.listen();
    let entry = stop.connect_and_read();
    entry.sniffer.listen();
    stop.terminate();
    stop.close_listener();
    stop.at(400).await;
    assert_eq!(stop.phase(), Phase::LameDuck);
    // Half a request head keeps it open.
    entry.flags.set(CLOSE_NOTICED);
    stop.at(410).await;
    assert!(stop.phase() > Phase::LameDuck);
    stop.leave(&entry);
}

#[tokio::test(start_paused = true)]
async fn the_streams_of_an_http2_connection_do_not_hide_an_idle_connection_of_a_shared_listener() {
    let mut stop = Stop::new(300, 5000, |it| it.shared_listener(true));
    stop.listen();
    let [http2, idle] = [stop.connect_and_read(), stop.connect_and_read()];
    http2.sniffer.note(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
    // As many requests as connections, all of them on one connection.
    let permits = [(); 2].map(|()| stop.shared().admission().admit().unwrap());
    stop.terminate();
    stop.close_listener();
    stop.at(400).await;
    assert_eq!(stop.phase(), Phase::LameDuck);
    stop.leave(&idle);
    // The task of the other connection may not have noticed either, but it is not waited for without end.
    stop.at(1400).await;
    assert_eq!(stop.phase(), Phase::Draining);
    drop(permits);
    stop.leave(&http2);
}

#[tokio::test(start_paused = true)]
async fn without_keep_listening_draining_waits_for_connections_that_have_not_noticed_the_close() {
    let mut stop = Stop::new(0, 5000, |it| it.keep_listening(false));
    stop.listen();
    let entry = stop.connect_and_read();
    entry.sniffer.listen();
    stop.terminate();
    stop.close_listener();
    stop.at(60).await;
    assert_eq!(entry.state.directive(), Directive::Close);
    // A request that its task reads now must be served, because load balancers do not retry a 503.
    assert_eq!(stop.phase(), Phase::LameDuck);
    entry.flags.set(CLOSE_NOTICED);
    stop.at(70).await;
    assert!(stop.phase() > Phase::LameDuck);
    stop.leave(&entry);
}

#[tokio::test(start_paused = true)]
async fn draining_does_not_wait_for_a_connection_that_its_server_has_dropped() {
    use crate::connection::flags::LINGERS;

    for flags in [0, LINGERS] {
        let mut stop = Stop::new(0, 5000, |it| it.keep_listening(false));
        stop.listen();
        let entry = stop.connect_and_read();
        entry.was_read_once_more();
        entry.flags.set(flags);
        stop.terminate();
        stop.close_listener();
        stop.at(500).await;
        assert_eq!(stop.phase() == Phase::LameDuck, flags == 0);
        stop.at(1500).await;
        assert!(stop.phase() > Phase::LameDuck);
        stop.leave(&entry);
    }
}

#[tokio::test(start_paused = true)]
async fn a_service_has_ended_when_no_request_connection_or_running_task_is_left() {
    let stop = Stop::new(0, 1000, unchanged);
    let shared = stop.shared();
    // A step that has not begun is not waited for.
    stop.graceful.cleanup("step", ms(10), async {}).unwrap();
    assert!(shared.has_ended());

    let entry = stop.connect();
    assert!(!shared.has_ended());
    stop.leave(&entry);
    let hold = stop.graceful.hold("work");
    assert!(!shared.has_ended());
    drop(hold);
    let (end, ended) = oneshot::channel::<()>();
    let worker = stop.graceful.worker("worker", |_| async move {
        let _ = ended.await;
    });
    worker.unwrap();
    assert!(!shared.has_ended());
    drop(end);
    stop.at(1).await;
    assert!(shared.has_ended());
}

#[cfg(unix)]
#[tokio::test(start_paused = true)]
async fn the_watchdog_names_what_is_left_and_has_no_message_if_nothing_is() {
    let mut stop = Stop::new(0, 1000, unchanged);
    let entry = stop.connect();
    let hold = stop.graceful.hold("job");
    stop.graceful.worker("short", |_| async {}).unwrap();
    stop.graceful
        .worker("pump", |stop| async move { stop.idle().await })
        .unwrap();
    stop.at(1).await;
    stop.terminate();
    let text = Subject::describe(&**stop.shared()).unwrap();
    let mut lines = text.lines();
    assert_eq!(
        lines.next(),
        Some(
            "shutdown: the grace period is nearly over, and the service is draining: in flight 1, \
             connections 1; the process is ended by the watchdog"
        )
    );
    assert!(lines.next().unwrap().contains("job"), "{text}");
    assert_eq!(lines.next(), Some("  pump has not ended"));
    assert_eq!(lines.next(), None);

    stop.leave(&entry);
    drop(hold);
    stop.graceful.stopped().await;
    assert_eq!(Subject::describe(&**stop.shared()), None);
    let _late = stop.connect();
    assert!(Subject::describe(&**stop.shared()).is_some());
}

/// Such a worker is dropped, and no code of it is left to record its end.
#[cfg(unix)]
#[test]
fn the_watchdog_does_not_name_a_worker_whose_runtime_has_shut_down() {
    let runtime = runtime(false);
    let stop = Stop::new(0, 1000, unchanged);
    let _hold = stop.graceful.hold("job");
    let worker = |_| std::future::pending::<()>();
    let registered = runtime.block_on(async { stop.graceful.worker("pump", worker) });
    registered.unwrap();
    let text = Subject::describe(&**stop.shared()).unwrap();
    assert!(text.contains("pump"), "{text}");
    drop(runtime);
    let text = Subject::describe(&**stop.shared()).unwrap();
    assert!(!text.contains("pump"), "{text}");
}

#[tokio::test(start_paused = true)]
async fn a_further_sigterm_changes_nothing() {
    let mut stop = Stop::new(1000, 1000, unchanged);
    let _hold = stop.graceful.hold("work");
    stop.terminate();
    for (after, phase) in [(500, Phase::LameDuck), (1005, Phase::Draining)] {
        stop.at(after).await;
        stop.shared().signal(Trigger::Terminate);
        assert_eq!(stop.phase(), phase);
    }
}

#[test]
fn a_call_in_another_runtime_does_not_change_the_clock_of_the_driver() {
    let stop = Stop::new(1000, 1000, unchanged);
    let (paused, real) = (runtime(true), runtime(false));
    for runtime in [&paused, &real] {
        runtime.block_on(async { stop.shared().drive() });
        assert_eq!(stop.shared().state().clock, Clock::Tokio);
    }
}

#[tokio::test]
async fn a_clock_that_is_paused_after_the_driver_was_spawned_applies() {
    let stop = Stop::new(1000, 1000, unchanged);
    stop.shared().drive();
    assert_eq!(stop.shared().state().clock, Clock::Real);
    tokio::time::pause();
    stop.shared().drive();
    assert_eq!(stop.shared().state().clock, Clock::Tokio);
}

/// The later one would take the place of the earlier one, whose end would look like the end of the only one.
#[test]
fn threads_that_spawn_a_driver_at_the_same_time_spawn_one() {
    let runtime = runtime(false);
    for round in 0..200 {
        let stop = Stop::new(1000, 1000, unchanged);
        let start = std::sync::Barrier::new(4);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let _entered = runtime.enter();
                    start.wait();
                    stop.shared().drive();
                });
            }
        });
        runtime.block_on(tokio::task::yield_now());
        assert!(stop.shared().is_driven(), "in round {round}");
    }
}

/// The control thread, which receives signals, knows only the real clock.
#[tokio::test(start_paused = true)]
async fn where_the_clock_is_paused_the_control_thread_leaves_signals_to_the_driver() {
    let stop = Stop::new(1000, 1000, unchanged);
    stop.shared().drive();
    assert!(Subject::on_signal(stop.shared(), Trigger::Terminate).is_none());
    assert_eq!(stop.phase(), Phase::Serving);
    stop.at(1).await;
    assert_eq!(stop.phase(), Phase::LameDuck);
    // It does not keep the deadlines either.
    assert!(!stop.shared().driver_waker.engage(false));
}

#[test]
fn the_control_thread_is_notified_of_changes_while_a_stop_is_under_way() {
    let graceful = Graceful::builder()
        .drain_delay(Duration::from_secs(20))
        .build()
        .unwrap();
    let is_engaged = |graceful: &Graceful| {
        let waker = &graceful.shared().driver_waker;
        let engaged = waker.engage(false);
        waker.engage(engaged);
        engaged
    };
    graceful.shared().change(|_, _| ());
    assert!(!is_engaged(&graceful));
    graceful.shared().trigger(Trigger::Shutdown);
    assert_eq!(graceful.phase(), Phase::LameDuck);
    assert!(is_engaged(&graceful));

    // A stop that is over after its first pass.
    let graceful = Graceful::new();
    graceful.shared().signal(Trigger::Terminate);
    assert_eq!(graceful.phase(), Phase::Stopped);
    assert!(!is_engaged(&graceful));
}

#[cfg(feature = "tracing")]
#[tokio::test(start_paused = true)]
async fn a_subscriber_is_kept_only_while_a_stop_is_under_way() {
    let _subscribed = tracing::subscriber::set_default(tracing_subscriber::registry());
    let mut stop = Stop::new(1000, 1000, unchanged);
    let has_subscriber = |stop: &Stop| stop.shared().state().origin.is_some();
    stop.shared().change(|_, _| ());
    assert!(!has_subscriber(&stop));
    stop.terminate();
    assert!(has_subscriber(&stop));
    stop.at(1010).await;
    assert_eq!(stop.phase(), Phase::Stopped);
    assert!(!has_subscriber(&stop));
    stop.shared().change(|_, _| ());
    assert!(!has_subscriber(&stop));
}

/// A destructor of a subscriber may block.
#[cfg(feature = "tracing")]
#[test]
fn the_control_thread_drops_no_subscriber() {
    use std::{sync::mpsc, thread};
    use tracing_subscriber::layer::{Layer, SubscriberExt};

    struct SaysWhere(mpsc::Sender<thread::ThreadId>);

    impl<S: tracing::Subscriber> Layer<S> for SaysWhere {}

    impl Drop for SaysWhere {
        fn drop(&mut self) {
            self.0.send(thread::current().id()).unwrap();
        }
    }

    let (send, dropped) = mpsc::channel();
    let subscriber = tracing_subscriber::registry().with(SaysWhere(send));
    let stop = Stop::new(1000, 1000, unchanged);
    tracing::subscriber::with_default(subscriber, || {
        stop.shared().state().origin = crate::events::Origin::here();
    });
    // This thread stands for the control thread.
    assert!(stop.shared().take_due_steps().is_none());
    let thread = dropped.recv_timeout(ms(20_000)).unwrap();
    assert_ne!(thread, thread::current().id());
}

#[tokio::test(start_paused = true)]
async fn servers_have_50_ms_to_be_dropped_before_the_service_has_stopped() {
    let mut stop = Stop::new(0, 1000, unchanged);
    stop.shared().server_began();
    stop.terminate();
    stop.at(1255).await;
    assert_eq!(
        (stop.phase(), stop.closing_stage()),
        (Phase::Closing, ClosingStage::Servers)
    );
    stop.at(1295).await;
    assert_eq!(stop.phase(), Phase::Closing);
    stop.at(1310).await;
    assert_eq!(stop.phase(), Phase::Stopped);
    let report = stop.shared().report().unwrap();
    assert_eq!(report.remaining().servers, 1);
}

/// A rule that is met at the moment when the delay is over anyway has shortened nothing.
#[tokio::test(start_paused = true)]
async fn a_delay_that_is_as_short_as_the_rule_does_not_end_early() {
    let stop = Stop::new(5000, 5000, |it| when_quiet(it.interrupt_delay(ms(1000))));
    stop.interrupt();
    five_requests(&stop);
    stop.graceful.stopped().await;
    let report = stop.shared().report().unwrap();
    assert_eq!(report.left_early(), None);
}

/// Without an admission it is certain only when the stop begins that no request reaches the layer.
#[tokio::test(start_paused = true)]
async fn a_layer_that_sees_no_request_is_reported_when_the_stop_or_the_drain_begins() {
    fn answer_outside(stop: &Stop) {
        let shared = stop.shared();
        let window = Window::open(shared, &Method::GET, "/", None, true).unwrap();
        window.answered(shared, StatusCode::OK);
    }
    let warnings = |stop: &Stop| lock!(stop.shared().warnings).len();

    let mut stop = Stop::new(1000, 1000, unchanged);
    stop.listen();
    answer_outside(&stop);
    assert_eq!(warnings(&stop), 0);
    stop.terminate();
    assert_eq!((stop.phase(), warnings(&stop)), (Phase::LameDuck, 1));

    let mut stop = Stop::new(1000, 1000, unchanged);
    stop.listen();
    let _hold = stop.graceful.hold("work");
    stop.terminate();
    answer_outside(&stop);
    assert_eq!((stop.phase(), warnings(&stop)), (Phase::LameDuck, 0));
    stop.at(1005).await;
    assert_eq!((stop.phase(), warnings(&stop)), (Phase::Draining, 1));
}

/// In each of its turns the driver finds one more signal, so it always has something to check.
#[cfg(feature = "tracing")]
#[tokio::test(start_paused = true)]
async fn notifications_without_end_delay_neither_the_cleanup_nor_other_tasks() {
    use tracing::{Event, Subscriber};
    use tracing_subscriber::layer::{Context, Layer, SubscriberExt};

    /// Sends a signal whenever an event is logged, as long as there are some left.
    use crate::sync::{AtomicUsize, Ordering::Relaxed};

    struct Signals(Shared, Arc<AtomicUsize>);

    impl<S: Subscriber> Layer<S> for Signals {
        fn on_event(&self, _: &Event<'_>, _: Context<'_, S>) {
            let less = |left: usize| left.checked_sub(1);
            let left = self.1.fetch_update(Relaxed, Relaxed, less);
            if left.is_ok() {
                assert!(Subject::on_signal(&self.0, Trigger::Terminate).is_none());
            }
        }
    }

    let mut stop = Stop::new(0, 1000, unchanged);
    let hold = stop.graceful.hold("until the driver runs");
    let runs = tokio::task::yield_now();
    stop.graceful.cleanup("step", ms(1000), runs).unwrap();
    stop.terminate();
    stop.at(1).await;
    let left = Arc::new(AtomicUsize::new(10_000));
    let signals = Signals(stop.shared().clone(), Arc::clone(&left));
    let signals = tracing_subscriber::registry().with(signals);
    let _subscribed = tracing::subscriber::set_default(signals);
    drop(hold);
    stop.graceful.stopped().await;
    let report = stop.shared().report().unwrap();
    assert_eq!(report.outcome(), Outcome::Clean, "{report}");
    assert_ne!(left.load(Relaxed), 0);
}

/// Of a server whose connections are unknown.
#[tokio::test(start_paused = true)]
async fn a_growing_part_of_the_responses_in_a_spread_asks_to_leave() {
    let mut stop = Stop::new(4000, 5000, |it| it.close_spread(ms(2000)));
    stop.terminate();
    for (after, part) in [(0, 0..=1), (1000, 45..=55), (2000, 100..=100)] {
        stop.at(after).await;
        let asks = (0..100).filter(|_| stop.shared().asks_to_leave()).count();
        assert!(part.contains(&asks), "{asks} after {after} ms");
    }
}

/// A response must not wait for a pass of the timeline.
#[test]
fn a_response_in_a_spread_does_not_wait_for_the_lock_of_the_timeline() {
    let stop = Stop::new(3_600_000, 7_200_000, |builder| {
        let builder = builder.grace_period(ms(14_400_000));
        builder.close_spread(ms(3_600_000))
    });
    stop.graceful.shutdown();
    assert_eq!(stop.shared().phase(), Phase::LameDuck);
    let shared = Arc::clone(stop.shared());
    let held = stop.shared().state();
    let (send, asked) = std::sync::mpsc::channel();
    let response = std::thread::spawn(move || {
        let slot = shared.slot_time(Place::nth(0));
        send.send((slot, shared.asks_to_leave())).unwrap();
    });
    let asked = asked.recv_timeout(ms(10_000));
    drop(held);
    response.join().unwrap();
    let (slot, asks) = asked.expect("the response waits");
    assert!(slot >= stop.begun && slot <= Instant::now());
    assert!(!asks, "the spread has just begun");
}

/// Its server would drop bytes that it could not write yet.
#[tokio::test(start_paused = true)]
async fn before_draining_connections_are_closed_a_second_late_for_a_client_that_does_not_read() {
    let mut stop = Stop::new(1000, 10_000, |it| it.keep_listening(false));
    let entry = stop.connect_and_read();
    entry.flags.set(UPGRADES);
    entry.state.set_blocked(true);
    stop.terminate();
    for (after, is_closed) in [(1990, false), (2010, true)] {
        stop.at(after).await;
        assert_eq!(stop.phase(), Phase::LameDuck);
        assert_eq!(entry.state.directive() == Directive::Close, is_closed);
    }
}

#[tokio::test(start_paused = true)]
async fn a_drain_future_counts_from_its_first_poll_until_it_resolves_or_is_dropped() {
    let stop = Stop::new(0, 1000, unchanged);
    let drains = || stop.shared().state().drains;
    let mut dropped = task::spawn(stop.graceful.drain_on(std::future::pending()));
    assert_eq!(drains(), 0);
    assert_pending!(dropped.poll());
    assert_eq!(drains(), 1);
    drop(dropped);
    assert_eq!(drains(), 0);
    let mut resolves = stop.graceful.drain_on(std::future::ready(()));
    (&mut resolves).await;
    assert_eq!(drains(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_future_that_is_dropped_waits_for_no_phase() {
    let stop = Stop::new(0, 1000, unchanged);
    let mut draining = task::spawn(stop.graceful.draining());
    assert_pending!(draining.poll());
    assert!(stop.shared().waiters.any(Phase::Draining));
    drop(draining);
    assert!(!stop.shared().waiters.any(Phase::Draining));
}

#[test]
fn only_the_default_paths_are_probes_once_they_have_a_route() {
    let graceful = Graceful::new();
    let shared = graceful.shared();
    assert!(!shared.is_probe("/livez"));
    let _probes: axum::Router = graceful.probes();
    assert!(shared.is_probe("/livez") && shared.is_probe("/readyz"));
    assert!(!shared.is_probe("/other"));
}

/// Requests of all connections would wait for it, on every thread.
#[cfg(all(feature = "axum", feature = "signal"))]
#[test]
fn a_read_in_the_lame_duck_phase_waits_for_no_shared_lock() {
    let builder = Graceful::builder().grace_period(ms(120_000));
    let graceful = builder.drain_delay(ms(60_000)).build().unwrap();
    let _probes: axum::Router = graceful.probes();
    let shared = graceful.shared();
    let mut io = graceful.track(&b"GET /livez HTTP/1.1\r\n\r\n"[..]);
    graceful.shutdown();
    assert_eq!(graceful.phase(), Phase::LameDuck);
    shared.connections.take_activity();
    let (send, read) = mpsc::channel();
    let held = (shared.state(), shared.connections.hold());
    let reader = thread::spawn(move || {
        let mut bytes = [0; 64];
        let mut buf = ReadBuf::new(&mut bytes);
        let cx = &mut Context::from_waker(Waker::noop());
        let polled = Pin::new(&mut io).poll_read(cx, &mut buf);
        send.send(polled.is_ready().then_some(buf.filled().len()))
            .unwrap();
        io
    });
    let read = read.recv_timeout(Duration::from_secs(10));
    drop(held);
    let io = reader.join().unwrap();
    assert_eq!(read, Ok(Some(23)));
    assert!(shared.connections.take_activity(), "the read is recorded");
    drop(io);
}
