"""What cluster.yaml needs of an AWS account, made once: python deploy/aws.py --help

A bucket; profiles by which a head starts workers and reaches the bucket, and by which workers do; a
security group that lets in the cluster's own nodes, and SSH from one address. A second run changes
the address.
"""

from __future__ import annotations

import argparse
import json
from contextlib import suppress
from typing import Any

import boto3

NAME = "robustness-grid"  # in cluster.yaml, too
EC2 = "arn:aws:iam::aws:policy/AmazonEC2FullAccess"


def allow(actions: list[str], resources: list[str], principal: str = "") -> dict[str, Any]:
    """Return a statement of a policy."""
    whose = {"Principal": {"Service": principal}} if principal else {"Resource": resources}
    return {"Effect": "Allow", "Action": actions, **whose}


def document(*statements: dict[str, Any]) -> str:
    """Return a policy as JSON."""
    return json.dumps({"Version": "2012-10-17", "Statement": statements})


def make_bucket(region: str, bucket: str) -> None:
    """Make the bucket unless it is there."""
    client = boto3.client("s3", region_name=region)
    # The oldest region is not named as a place.
    place = {} if region == "us-east-1" else {"LocationConstraint": region}
    with suppress(client.exceptions.BucketAlreadyOwnedByYou):
        client.create_bucket(
            Bucket=bucket, **({"CreateBucketConfiguration": place} if place else {})
        )


def make_profile(name: str, policy: str, managed: tuple[str, ...] = ()) -> str:
    """Make an instance profile with a role of its own, and return the role's ARN."""
    client = boto3.client("iam")
    with suppress(client.exceptions.EntityAlreadyExistsException):
        trust = document(allow(["sts:AssumeRole"], [], "ec2.amazonaws.com"))
        client.create_role(RoleName=name, AssumeRolePolicyDocument=trust)
    with suppress(client.exceptions.EntityAlreadyExistsException):
        client.create_instance_profile(InstanceProfileName=name)
    with suppress(client.exceptions.LimitExceededException):  # it has its role
        client.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
    client.put_role_policy(RoleName=name, PolicyName=NAME, PolicyDocument=policy)
    for arn in managed:
        client.attach_role_policy(RoleName=name, PolicyArn=arn)
    return str(client.get_role(RoleName=name)["Role"]["Arn"])


def make_group(region: str, address: str) -> None:
    """Make the security group in the default network, or set anew whom it lets in."""
    ec2 = boto3.resource("ec2", region_name=region)
    (network,) = ec2.vpcs.filter(Filters=[{"Name": "is-default", "Values": ["true"]}])
    named = [{"Name": "group-name", "Values": [NAME]}]
    group = next(iter(network.security_groups.filter(Filters=named)), None)
    if group is None:
        group = ec2.create_security_group(GroupName=NAME, Description=NAME, VpcId=network.id)
    if group.ip_permissions:
        group.revoke_ingress(IpPermissions=group.ip_permissions)
    own = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group.id}]}
    ssh = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": address}]}
    group.authorize_ingress(IpPermissions=[own, ssh])


def main() -> None:
    """Make what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bucket")
    parser.add_argument("--region", required=True)
    parser.add_argument("--ssh-from", required=True, metavar="ADDRESS/BITS")
    options = parser.parse_args()
    make_bucket(options.region, options.bucket)
    own = f"arn:aws:s3:::{options.bucket}"
    reads = allow(["s3:*Object", "s3:ListBucket", "s3:AbortMultipartUpload"], [own, f"{own}/*"])
    role = make_profile(f"{NAME}-worker", document(reads))
    passes = allow(["iam:PassRole"], [role])
    make_profile(f"{NAME}-head", document(reads, passes), (EC2,))
    make_group(options.region, options.ssh_from)


if __name__ == "__main__":
    main()
