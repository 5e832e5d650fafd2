//! Tests of messages and of what disturbs hosts.

use std::net::Ipv4Addr;

use tokio::time::timeout;

use super::*;

const A: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1));
const B: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 2));
const SECOND: Duration = Duration::from_secs(1);

#[tokio::test(start_paused = true)]
async fn a_message_waits_for_a_way_and_arrives_when_there_is_one() {
    let net = Net::new(1, Path::default(), &Tasks::new());
    assert!(timeout(SECOND / 10, net.carry(A, B)).await.is_ok());
    net.freeze(B);
    assert!(timeout(60 * SECOND, net.carry(A, B)).await.is_err(), "nothing reaches a host that is frozen");
    let (carried, thawed) = (net.carry(B, A), async {
        sleep(SECOND).await;
        net.thaw(B);
    });
    assert!(timeout(2 * SECOND, async { tokio::join!(carried, thawed) }).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn what_disturbs_two_hosts_is_known_until_it_is_over() {
    let net = Net::new(1, Path::default(), &Tasks::new());
    let quiet = |since| net.is_undisturbed(A, B, since);
    let begun = Instant::now();
    sleep(SECOND).await;
    assert!(quiet(begun));
    net.cut_one_way(B, A);
    assert!(!quiet(begun) && !quiet(Instant::now()), "it is cut now");
    sleep(SECOND).await;
    net.heal_all();
    assert!(!quiet(begun) && quiet(Instant::now()));
    sleep(SECOND).await;
    let healed = Instant::now();
    net.trouble(B);
    sleep(SECOND).await;
    assert!(quiet(healed) && !quiet(healed - SECOND));
}
