//! A UDP flow: a socket that talks to one target, for as long as the stream lives that stands for it.

use std::sync::Arc;

use proto::{
    audit::AccessRecord,
    code::RefuseCode,
    stream::{Answer, Refusal},
    target::HostPort,
};
use runtime::{
    flow::{self, PacketSink, Terms, relay, socket, stream},
    link::Stream,
    splice::Meter,
};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::{Ended, Server, abandoned, finished};
use crate::dial::connect_udp;

impl Server {
    /// Serves a flow. `plan` is the target, the rule that allows it, and whether its addresses need one as well.
    pub(super) async fn flow(
        &self,
        mut stream: Stream,
        mut record: AccessRecord,
        plan: (&HostPort, &str, bool),
        began: Instant,
    ) -> Ended {
        let (to, rule, by_address) = plan;
        let Ok(_permit) = Arc::clone(&self.flows).try_acquire_owned() else {
            let why = format!("edge {} serves as many UDP flows as limits.udp_flows allows", self.edge);
            return self.refused(stream, record, Refusal::because(RefuseCode::LimitReached, why)).await;
        };
        let connected = {
            let left = stream.send.refused();
            tokio::select! {
                biased;
                error = left => Err(error),
                connected = connect_udp(&self.allow, to, rule, by_address, self.bounds.dial) => Ok(connected),
            }
        };
        let connected = match connected {
            Ok(Ok(connected)) => connected,
            Ok(Err(refusal)) => return self.refused(stream, record, refusal).await,
            Err(error) => return abandoned(stream, record, &error),
        };
        let address = connected.address.to_string();
        record.open_us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
        (record.rule, record.address) = (connected.rule, address.clone());
        let answer = Answer::Opened { edge: self.edge.clone(), address }.encode();
        if let Err(error) = stream.send.write_one(answer).await {
            return abandoned(stream, record, &error);
        }
        debug!(address = record.address, rule = record.rule, "flow opened");
        let (mut opener, mut target) = (stream::side(stream), socket::side(connected.socket));
        opener.sink.opened();
        let meter = Meter::default();
        let cancel = CancellationToken::new();
        let terms = Terms { meter: &meter, idle: Some(self.bounds.idle), cancel: &cancel };
        self.metrics.flows_active.inc();
        let (result, tally) = relay(&mut opener, &mut target, &terms).await;
        self.metrics.flows_active.dec();
        self.metrics.flow_carried(&tally);
        if result == Ok(flow::Finished::Idle) {
            debug!(idle = ?self.bounds.idle, "nothing came on a flow for so long that it ended");
        }
        finished(record, &result.map(drop), &meter)
    }
}
