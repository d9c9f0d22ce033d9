//! Without features the crate depends on nothing.

#[test]
fn every_dependency_is_optional() {
    let manifest = include_str!("../Cargo.toml");
    let section =
        |name: &str| manifest.split(name).nth(1).expect("it is there").split("\n[").next().unwrap_or("");
    let dependencies = section("\n[dependencies]\n");
    let lines: Vec<&str> = dependencies.lines().filter(|line| !line.trim().is_empty()).collect();
    assert!(lines.len() >= 7, "{lines:?}");
    for line in lines {
        assert!(line.contains("optional = true"), "{line}");
    }
    assert!(section("\n[features]\n").contains("default = []"));
}
