//! See [`egress_tests::asker`].

fn main() -> anyhow::Result<()> {
    egress_tests::asker::main()
}
